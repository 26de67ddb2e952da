"""Large samples from shipped models, with the same classes and seeds for every model and number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.utils import make_grid

from ..autoencoder import FrozenAutoencoder
from ..config import load_config
from ..data.sources import list_images
from ..errors import UserError, one_line
from ..models.unet import SMDUNet2DModel
from ..pipelines import SMDPipeline, load_pipeline
from ..sampling.batches import SamplingOptions, sample_pixels
from ..schedulers.schedule import build_scheduler
from ..training.coarse_labels import class_names
from ..training.model_folder import model_card, write_model_folder
from ..training.settings import TrainConfig
from .settings import ShowcaseConfig


@dataclass(frozen=True)
class Row:
    """A row of images, (3, H, W) in [0, 1], and its caption in the report."""

    caption: str
    images: torch.Tensor


class Showcase:
    """Samples of shipped models. All inputs are read at once, so that a missing one is reported before anything is written."""

    def __init__(self, config: ShowcaseConfig) -> None:
        self.config = config
        if not config.models:
            return
        self.training = load_config(TrainConfig, config.config)
        self.classes = class_names(self.training, list_images(config.images).classes)
        unknown = [name for name in config.classes if name not in self.classes]
        if unknown or not config.classes:
            known = ", ".join(self.classes)
            raise UserError(f"showcase.classes: expected some of {known}, found {unknown[0] if unknown else 'none'}")
        self.autoencoder = FrozenAutoencoder.from_pretrained(self.training.autoencoder)
        self.unets = {model.name: load_unet("showcase.models[].checkpoint", model.checkpoint) for model in config.models}

    def rows(self, output: Path, seed: int) -> list[Row]:
        """Write the model folders OUTPUT/NAME/model, for use by other tools, and sample from them."""
        found = []
        for model in self.config.models:
            folder = output / model.name / "model"
            write_shipped(folder, model.checkpoint, self.unets[model.name], self.autoencoder, self.classes, self.training)
            pipeline = load_pipeline(folder)
            labels = [self.classes.index(name) for name in self.config.classes]
            guidance = f", guidance {model.guidance_scale:g}" if model.guidance_scale != 1 else ""
            for steps in model.steps:
                options = SamplingOptions(
                    steps, model.guidance_scale, seed=seed, batch_size=16, timestep_shift=model.timestep_shift
                )
                caption = f"{model.caption}, {steps} step{'s' if steps > 1 else ''}{guidance}"
                pixels = sample_pixels(pipeline, labels, len(labels), options, caption)
                found.append(Row(caption, make_grid(pixels, nrow=len(labels), padding=2, pad_value=0.8)))
        return found


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
) -> None:
    """Write the model folder of a shipped network, where a training run would write it."""
    labels = {str(number): name for number, name in enumerate(classes)} if unet.config.num_classes else None
    pipeline = SMDPipeline(unet, autoencoder.model, build_scheduler(config.diffusion), labels)
    card = model_card(folder.parent.name, f"The shipped weights of `{checkpoint}`.", config)
    write_model_folder(folder, pipeline, card, "unet")
