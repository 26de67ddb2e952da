"""Speed of training from an object store, relative to training from a local folder.

Both read the same shards in turn, from the store with an empty cache. The bandwidth is twice what the fastest local round
needed. One training has a very small network and shards of 250 images, which is the hardest case for the store. The other has
the demo's network, and shards of the default size of tools/encode.py. Time is measured after as many images as a full shard
has, because the first shard is downloaded while nothing can be trained. Every round gives:

- ``ratio``: ratio of images per second.
- ``cpu_ratio``: ratio of images per second of CPU time of the process. It is the ratio to expect if the server, the proxy and
  other programs run on other cores.
- ``trains``: fraction of that CPU time in the training thread. The rest fetches shards. It varies less.

Results are medians over the rounds with 95 % bootstrap intervals. ``store_and_worker`` reads with num_workers=1, so another
process fetches, whose CPU time is not counted.
"""

from __future__ import annotations

import math
import random
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ldm_smd.config import load_config
from ldm_smd.data.settings import CacheConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream, latent_loader
from ldm_smd.training.metrics_log import DataWaits
from ldm_smd.training.run import Run
from ldm_smd.training.settings import TrainConfig
from ldm_smd.training.step import Denoising

TINY = ["model.block_out_channels=[32,64]", "model.attention_head_dim=16", "model.z_channels=0", "objective.name=mse"]
TINY += ["autoencoder=checkpoints/autoencoder-emoji", "batch_size=64", "precision=no"]
DEMO = "configs/train/emoji-vanilla.yaml"
LINK = 2.0
THREADS = max(1, torch.get_num_threads() - 1)
"""The rest is for the server and the proxy, which would otherwise be on another machine."""


@dataclass(frozen=True)
class Training:
    """A training to measure.

    Attributes:
        shards: local folder with the shards.
        images: number of images in each round, those of the first shard included.
        places: where shards are read from: "local", "store" or "store_and_worker".
    """

    name: str
    config: str | None
    settings: list[str]
    shards: Path
    images: int
    rounds: int
    places: tuple[str, ...]


def trainings(small: Path, large: Path, rounds: int, demo_rounds: int) -> list[Training]:
    tiny, demo = "a tiny network, 250 images a shard", f"{DEMO}, 1000 images a shard"
    return [
        Training(tiny, None, TINY, small, 3401, rounds, ("local", "store", "store_and_worker")),
        Training(demo, DEMO, ["precision=no"], large, 3401, demo_rounds, ("local", "store")),
    ]


class Trainee:
    """Runs the steps of a training."""

    def __init__(self, training: Training, folder: Path) -> None:
        settings = [*training.settings, f"shards={training.shards}", f"output={folder / 'run'}"]
        config = load_config(TrainConfig, training.config, settings)
        accelerator = Accelerator(mixed_precision="no")
        self.batch_size, self.images_seen, self.device = config.batch_size, 0, accelerator.device
        self.images = training.images // self.batch_size * self.batch_size
        self.learner = Denoising(Run.open(config, accelerator))
        self.learner.model.prepare(accelerator)

    def speed(self, manifest: Manifest, seed: int, workers: int = 0) -> dict[str, float]:
        """Train on the images of a round. Returns, for the images after the first shard, images per second, the fraction of the
        time spent waiting for data, and the CPU time per image in milliseconds, of the process and of its other threads."""
        stream, waits = LatentStream(manifest, self.batch_size, self.images, seed=seed), DataWaits()
        first = math.ceil(max(shard["count"] for shard in manifest.shards) / self.batch_size)
        started, processor, trains = 0.0, 0.0, 0.0
        for index, batch in enumerate(waits.timed(latent_loader(stream, workers))):
            if index == first:
                waits.share()
                started, processor, trains = time.perf_counter(), time.process_time(), time.thread_time()
            self.learner.step(batch.to(self.device), self.images_seen, learning_rate=1e-4)
            self.images_seen += self.batch_size
        measured = self.images - first * self.batch_size
        seconds, each = time.perf_counter() - started, 1e3 / measured
        processor, trains = time.process_time() - processor, time.thread_time() - trains
        of_time = {"cpu_ms": processor * each, "cpu_ms_of_other_threads": (processor - trains) * each}
        return {"images_per_second": measured / seconds, "waits": waits.share(), **of_time}


def training_rounds(training: Training, limit: Callable[[float | None], Any], url: str, folder: Path) -> dict:
    """Measure all rounds. In each, the places are in random order."""
    torch.set_num_threads(THREADS)
    trainee, local = Trainee(training, folder / training.shards.name), Manifest.load(training.shards)
    bytes_per_image = sum((training.shards / item["name"]).stat().st_size for item in local.shards) / local.count
    needed = bytes_per_image * trainee.speed(local, seed=0)["images_per_second"]
    rows: list[dict] = []
    for seed in range(1, training.rounds + 1):
        row: dict[str, Any] = {}
        for place in random.Random(seed).sample(training.places, len(training.places)):
            if place == "local":
                row[place] = trainee.speed(local, seed)
                needed = max(needed, bytes_per_image * row[place]["images_per_second"])
            else:
                limit(LINK * needed)
                shutil.rmtree(folder / "training-cache", ignore_errors=True)
                remote = Manifest.load(url, CacheConfig(str(folder / "training-cache")))
                row[place] = trainee.speed(remote, seed, workers=int(place == "store_and_worker"))
        for place in training.places[1:]:
            row[f"{place} ratio"] = row[place]["images_per_second"] / row["local"]["images_per_second"]
            row[f"{place} cpu_ratio"] = row["local"]["cpu_ms"] / row[place]["cpu_ms"]
            row[f"{place} trains"] = 1 - row[place]["cpu_ms_of_other_threads"] / row[place]["cpu_ms"]
        rows.append({name: rounded(value) for name, value in row.items()})
        print(training.name, rows[-1], flush=True)
    limit(None)
    summary = {name: median_and_interval([row[name] for row in rows]) for name in rows[0] if name not in training.places}
    return {"training": training.name, **summary, "link_bytes_per_second": round(LINK * needed), "rounds": rows}


def rounded(value: Any) -> Any:
    return {name: round(each, 4) for name, each in value.items()} if isinstance(value, dict) else round(value, 4)


def median_and_interval(values: list[float]) -> dict[str, Any]:
    """Return the median and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return {"median": round(statistics.median(values), 4), "interval": [round(float(low), 4), round(float(high), 4)]}
