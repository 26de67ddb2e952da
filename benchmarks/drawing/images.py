"""Images by the shipped models: the strip from noise to images, and the image of the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ldm_smd import SMDPipeline
from ldm_smd.apps.settings import DemoConfig
from ldm_smd.config import load_config
from ldm_smd.pipelines import load_pipeline, seeded_generators
from ldm_smd.sampling.batches import SamplingOptions, sample_pixels

SHIPPED = Path("checkpoints")
QUALITY = 88
SIDE, GAP = 128, 16
README_LABELS = (7, 6, 1, 4, 5, 9, 0, 3, 7, 6, 8, 3)
STRIP_COLUMNS, LARGE_STRIP_COLUMNS = (0, 1, 11), (0, 1, 3)
"""Columns of the README's image that the strip shows."""
STRIP_STEPS = 4
LARGE_STRIP_SHOWN = (0, 9, 12, 15, 16)


class LargeRow:
    """Model, labels and settings of the first row of large images in the report of the demo."""

    def __init__(self) -> None:
        settings = load_config(DemoConfig, "configs/demo.yaml").showcase
        self.pipeline, model = load_pipeline(SHIPPED / "emoji-256-gaussian"), settings.models[0]
        self.labels = [self.pipeline.label_of(name) for name in settings.classes]
        shift = model.timestep_shift
        self.options = SamplingOptions(model.steps[0], model.guidance_scale, seed=0, batch_size=16, timestep_shift=shift)


def readme(path: Path) -> Path:
    """Make the README's image: the first row of the demo's large images at half size, then four steps of the Gaussian model and
    of the mixture at double size, with the same labels and seeds."""
    large = LargeRow()
    rows = [row(sample_pixels(large.pipeline, large.labels, len(large.labels), large.options, "256 pixels"))]
    rows.append(torch.ones(3, GAP, rows[0].shape[2]))
    for name in ("emoji-gaussian", "emoji-smd"):
        options = SamplingOptions(STRIP_STEPS, 1.0, seed=0, batch_size=16)
        labels = list(README_LABELS)
        rows.append(row(sample_pixels(load_pipeline(SHIPPED / name), labels, len(labels), options, name)))
    return write(torch.cat(rows, dim=1), path)


def strip(path: Path) -> Path:
    """Make the strip: x_t decoded after each step, for some of the README's images. Rows are images and columns steps.

    On the left are four steps of the mixture at 64 pixels, on the right some of the sixteen steps of the Gaussian model at 256.
    """
    shown = range(STRIP_STEPS + 1)
    labels = [README_LABELS[column] for column in STRIP_COLUMNS]
    small = frames(load_pipeline(SHIPPED / "emoji-smd"), labels, STRIP_COLUMNS, SamplingOptions(STRIP_STEPS, 1.0), shown)
    large = LargeRow()
    labels = [large.labels[column] for column in LARGE_STRIP_COLUMNS]
    big = frames(large.pipeline, labels, LARGE_STRIP_COLUMNS, large.options, LARGE_STRIP_SHOWN)
    left, right = (torch.cat([row(pixels) for pixels in torch.stack(columns, dim=1)], dim=1) for columns in (small, big))
    return write(torch.cat((left, torch.ones(3, left.shape[1], GAP), right), dim=2), path)


def row(pixels: torch.Tensor) -> torch.Tensor:
    """Resize images (N, 3, H, W) to ``SIDE`` pixels and put them side by side: (3, SIDE, N * SIDE)."""
    resized = F.interpolate(pixels, size=SIDE, mode="bicubic", antialias=True, align_corners=False)
    return make_grid(resized, nrow=len(pixels), padding=0)


def frames(
    pipeline: SMDPipeline, labels: Sequence[int], seeds: Sequence[int], options: SamplingOptions, shown: Sequence[int]
) -> list[torch.Tensor]:
    """Decode x_t before the first step (0) and after the steps in ``shown``: a list of images (N, 3, H, W) in [0, 1]."""
    found: list[torch.Tensor] = []

    def keep(pipeline: SMDPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        states = [tensors["sample"]] if step == 0 else []
        for index, x_t in enumerate([*states, tensors["latents"]], start=step + 1 - len(states)):
            if index in shown:
                found.append(pipeline.decode_latents(x_t) / 2 + 0.5)
        return {}

    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        list(labels),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        timestep_shift=options.timestep_shift,
        generator=seeded_generators(seeds),
        output_type="latent",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents", "sample"],
    )
    return found


def write(pixels: torch.Tensor, path: Path) -> Path:
    """Write (3, H, W) in [0, 1] as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(pixels.clamp(0, 1)).save(path, quality=QUALITY, optimize=True)
    return path
