"""Pictures by the shipped models: the strip from noise to pictures, and the picture of the README."""

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
"""Of the README's picture, what the strip shows."""
STRIP_STEPS = 4
LARGE_STRIP_SHOWN = (0, 20, 32, 40, 50)


class LargeRow:
    """The first row of large pictures in the report of the demo: its model, labels and settings."""

    def __init__(self) -> None:
        settings = load_config(DemoConfig, "configs/demo.yaml").showcase
        self.pipeline, model = load_pipeline(SHIPPED / "emoji-256-gaussian"), settings.models[0]
        self.labels = [self.pipeline.label_of(name) for name in settings.classes]
        self.options = SamplingOptions(model.steps[0], model.guidance_scale, seed=0, batch_size=16)


def readme(path: Path) -> Path:
    """Above, at half size, the first row of the demo's large pictures; below, at double size, four steps of the Gaussian model,
    and of the mixture, with the same labels and seeds."""
    large = LargeRow()
    rows = [row(sample_pixels(large.pipeline, large.labels, len(large.labels), large.options, "256 pixels"))]
    rows.append(torch.ones(3, GAP, rows[0].shape[2]))
    for name in ("emoji-gaussian", "emoji-smd"):
        options = SamplingOptions(STRIP_STEPS, 1.0, seed=0, batch_size=16)
        labels = list(README_LABELS)
        rows.append(row(sample_pixels(load_pipeline(SHIPPED / name), labels, len(labels), options, name)))
    return write(torch.cat(rows, dim=1), path)


def strip(path: Path) -> Path:
    """Some of the README's pictures, one a row, a step a column: the noise, then what is left of it after each step, decoded.
    On the left four steps of the mixture of 64 pixels, on the right fifty of the Gaussian model of 256, some of them."""
    shown = range(STRIP_STEPS + 1)
    labels = [README_LABELS[column] for column in STRIP_COLUMNS]
    small = frames(load_pipeline(SHIPPED / "emoji-smd"), labels, STRIP_COLUMNS, SamplingOptions(STRIP_STEPS, 1.0), shown)
    large = LargeRow()
    labels = [large.labels[column] for column in LARGE_STRIP_COLUMNS]
    big = frames(large.pipeline, labels, LARGE_STRIP_COLUMNS, large.options, LARGE_STRIP_SHOWN)
    left, right = (torch.cat([row(pixels) for pixels in torch.stack(columns, dim=1)], dim=1) for columns in (small, big))
    return write(torch.cat((left, torch.ones(3, left.shape[1], GAP), right), dim=2), path)


def row(pixels: torch.Tensor) -> torch.Tensor:
    """Bring (N, 3, H, W) to ``SIDE`` pixels, side by side: (3, SIDE, N * SIDE)."""
    resized = F.interpolate(pixels, size=SIDE, mode="bicubic", antialias=True, align_corners=False)
    return make_grid(resized, nrow=len(pixels), padding=0)


def frames(
    pipeline: SMDPipeline, labels: Sequence[int], seeds: Sequence[int], options: SamplingOptions, shown: Sequence[int]
) -> list[torch.Tensor]:
    """Decode x_t before the first step (0) and after the steps asked for: images (N, 3, H, W) in [0, 1], for each."""
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
