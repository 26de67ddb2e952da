"""Images by the shipped models: the strip from noise to images, and the image of the README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
FEW_STEPS = 4
STRIP_COLUMNS = (1, 3, 7)
"""Columns of the README's image that the strip shows."""
FEW_SHOWN, SHOWN = range(FEW_STEPS + 1), (0, 4, 6, 7, 8)
"""Numbers of steps after which the strip shows x_t: left, right."""


class DemoRow:
    """Mixture, labels and settings of the first row of large images in the report of the demo."""

    def __init__(self) -> None:
        settings = load_config(DemoConfig, "configs/demo.yaml").showcase
        self.pipeline, model = load_pipeline(SHIPPED / "emoji-256-smd"), settings.models[0]
        self.labels = [self.pipeline.label_of(name) for name in settings.classes]
        shift = model.timestep_shift
        self.options = SamplingOptions(model.steps[0], model.guidance_scale, seed=0, batch_size=16, timestep_shift=shift)
        self.few_steps = replace(self.options, steps=FEW_STEPS, guidance_scale=1.0)


def readme(path: Path) -> Path:
    """Make the README's image: the demo's first row of large images, then few steps of the Gaussian model and of the mixture
    without guidance, with the same labels and seeds."""
    demo = DemoRow()
    gaussian = load_pipeline(SHIPPED / "emoji-256-gaussian")
    samples = [(demo.pipeline, demo.options), (gaussian, demo.few_steps), (demo.pipeline, demo.few_steps)]
    rows = [row(sample_pixels(model, demo.labels, len(demo.labels), options, "README")) for model, options in samples]
    rows.insert(1, torch.ones(3, GAP, rows[0].shape[2]))
    return write(torch.cat(rows, dim=1), path)


def strip(path: Path) -> Path:
    """Make the strip: x_t decoded after each step, for some of the README's images. Rows are images and columns steps.

    On the left are few steps of the mixture without guidance, on the right some of the steps of the demo's first row.
    """
    demo = DemoRow()
    labels = [demo.labels[column] for column in STRIP_COLUMNS]
    both = [
        frames(demo.pipeline, labels, STRIP_COLUMNS, options, shown)
        for options, shown in ((demo.few_steps, FEW_SHOWN), (demo.options, SHOWN))
    ]
    left, right = (torch.cat([row(pixels) for pixels in torch.stack(columns, dim=1)], dim=1) for columns in both)
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
