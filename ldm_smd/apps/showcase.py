"""Large samples from shipped models, with the same classes and seeds for every model and number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from torchvision.utils import make_grid

from ..autoencoder import FrozenAutoencoder
from ..config import load_config
from ..data.sources import list_images
from ..errors import UserError, one_line
from ..models.guide import load_guide
from ..models.unet import SMDUNet2DModel
from ..pipelines import SMDPipeline, load_pipeline
from ..sampling.batches import SamplingOptions, sample_pixels
from ..schedulers.schedule import build_scheduler
from ..training.coarse_labels import class_names
from ..training.model_folder import model_card, write_model_folder
from ..training.settings import TrainConfig
from .settings import ShowcaseConfig, ShownModelConfig


@dataclass(frozen=True)
class Row:
    """A row of images, (3, H, W) in [0, 1], and its caption in the report."""

    caption: str
    images: torch.Tensor


class ShownModel:
    """A shipped model of the showcase."""

    def __init__(self, settings: ShownModelConfig, showcase: ShowcaseConfig, classes: list[str]) -> None:
        """``classes`` are the names of the classes of the images."""
        self.settings, self.training = settings, load_config(TrainConfig, settings.config)
        self.classes = class_names(self.training, classes)
        unknown = [name for name in showcase.classes if name not in self.classes]
        if unknown or not showcase.classes:
            known = ", ".join(self.classes)
            raise UserError(f"showcase.classes: expected some of {known}, found {unknown[0] if unknown else 'none'}")
        self.labels = [self.classes.index(name) for name in showcase.classes]
        self.autoencoder = FrozenAutoencoder.from_pretrained(self.training.autoencoder)
        self.unet = load_unet("showcase.models[].checkpoint", settings.checkpoint)
        self.guide = load_guide(settings.guide, "showcase.models[].guide", self.unet) if settings.guide else None

    def rows(self, folder: Path, seed: int) -> Iterator[Row]:
        """Write the model folder, for use by other tools, and sample from it."""
        checkpoint = self.settings.checkpoint
        guidance, shift = self.settings.guidance_scale, self.settings.timestep_shift
        write_shipped(folder, checkpoint, self.unet, self.autoencoder, self.classes, self.training, self.guide, shift)
        pipeline = load_pipeline(folder)
        for steps in self.settings.steps:
            caption = f"{self.settings.caption}, {steps} step{'s' if steps > 1 else ''}"
            caption += f", guidance {guidance:g}" if guidance != 1 else ""
            options = SamplingOptions(steps, guidance, seed=seed, batch_size=16)
            pixels = sample_pixels(pipeline, self.labels, len(self.labels), options, caption)
            yield Row(caption, make_grid(pixels, nrow=len(self.labels), padding=2, pad_value=0.8))


class Showcase:
    """Samples of shipped models. All inputs are read at once, so that a missing one is reported before anything is written."""

    def __init__(self, config: ShowcaseConfig) -> None:
        classes = list_images(config.images).classes if config.models else []
        self.models = [ShownModel(model, config, classes) for model in config.models]

    def rows(self, output: Path, seed: int) -> list[Row]:
        """Sample from the models, whose folders are OUTPUT/NAME/model."""
        return [row for model in self.models for row in model.rows(output / model.settings.name / "model", seed)]


def load_unet(key: str, folder: str) -> SMDUNet2DModel:
    """Load a shipped network."""
    try:
        return SMDUNet2DModel.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: expected the folder of an SMDUNet2DModel, found {folder}: {one_line(error)}") from error


def write_shipped(
    folder: Path,
    checkpoint: str,
    unet: SMDUNet2DModel,
    autoencoder: FrozenAutoencoder,
    classes: list[str],
    config: TrainConfig,
    guide: ModelMixin | None = None,
    timestep_shift: float | None = None,
) -> None:
    """Write the model folder of a shipped network and its guide, where a training run would write it.

    Args:
        timestep_shift: default of the model folder. None: that of the training.
    """
    labels = {str(number): name for number, name in enumerate(classes)} if unet.config.num_classes else None
    scheduler, shift = build_scheduler(config.diffusion), timestep_shift or config.sampling_shift or config.timestep_shift
    pipeline = SMDPipeline(unet, autoencoder.model, scheduler, labels, guide=guide, timestep_shift=shift)
    card = model_card(folder.parent.name, f"The shipped weights of `{checkpoint}`.", config)
    write_model_folder(folder, pipeline, card, "unet")
