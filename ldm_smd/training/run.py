"""Objects that exist for the whole run of tools/train.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin

from ..autoencoder import FrozenAutoencoder
from ..data.shards import Manifest
from ..data.stream import LatentStream
from ..diffusion.process import GaussianPath
from ..schedulers.conversion import path_of
from ..schedulers.schedule import build_scheduler
from .coarse_labels import coarse_labels
from .record import MAY_CHANGE, NOT_COMPARED, RunRecord, open_record
from .settings import TrainConfig


@dataclass(frozen=True)
class Run:
    """Settings, data, frozen networks and processes of a training run.

    Attributes:
        manifest: manifest of the latent shards.
        autoencoder: the one they were encoded with, on the accelerator's device.
        scheduler: scheduler of the path from data to noise.
        coarse: labels of the coarse classes of every class, (classes, parts), on the device; None without coarse classes.
    """

    config: TrainConfig
    accelerator: Accelerator
    manifest: Manifest
    autoencoder: FrozenAutoencoder
    scheduler: SchedulerMixin
    record: RunRecord
    coarse: torch.Tensor | None = None

    @classmethod
    def open(cls, config: TrainConfig, accelerator: Accelerator) -> Run:
        """Read what ``config`` names, writing nothing; UserError where the parts do not belong together."""
        manifest = Manifest.load(config.shards, config.shards_cache)
        autoencoder = FrozenAutoencoder.from_pretrained(config.autoencoder).to(accelerator.device)
        manifest.check_autoencoder(autoencoder)
        record = open_record(Path(config.output), {"shards": manifest.sha256}, config, NOT_COMPARED, MAY_CHANGE)
        coarse = coarse_labels(config, manifest.classes)
        on_device = None if coarse is None else coarse.to(accelerator.device)
        return cls(config, accelerator, manifest, autoencoder, build_scheduler(config.diffusion), record, on_device)

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def process(self) -> GaussianPath:
        """Return the path from data to noise, on the device."""
        return path_of(self.scheduler).to(self.accelerator.device)

    def batches(self, images_seen: int = 0) -> LatentStream:
        """Stream this process's slice of every batch after ``images_seen``."""
        config = self.config
        rank, world, embeddings = self.accelerator.process_index, self.accelerator.num_processes, config.image_conditional
        lengths = (config.batch_size, config.images_total, images_seen)
        return LatentStream(self.manifest, *lengths, config.seed, config.mirror, rank, world, embeddings)
