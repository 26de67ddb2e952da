"""Prints how calibrated the draws of mixtures are, by timestep: spread ratio and gain (ldm_smd/evaluation/diagnostics.py).

    python benchmarks/draws.py images.source=data/emoji/heldout.zip images.resolution=64 models=[checkpoints/emoji-smd]

``models``: model folders (RUN/model). The images should be new to them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.cli import run_tool
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.evaluation.diagnostics import Spread, spread_over_eta
from ldm_smd.models.denoiser import model_labels
from ldm_smd.pipelines import load_pipeline
from ldm_smd.schedulers.conversion import process_of

ENCODING_BATCH = 64


@dataclass
class DrawsConfig:
    """Settings of this benchmark."""

    models: list[str] = field(default_factory=list)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    timesteps: list[int] = field(default_factory=lambda: [249, 499, 749, 874, 937])
    count: int = 256
    """Number of images, chosen at random."""
    draws: int = 8


def measure(name: str, pixels: torch.Tensor, labels: torch.Tensor, config: DrawsConfig) -> dict[int, Spread]:
    """Measure the draws of a model for noised images, uint8 (N, 3, H, W), with labels (N,), -1 for none."""
    pipeline = load_pipeline(name)
    autoencoder, process, unet = FrozenAutoencoder(pipeline.vae), process_of(pipeline.scheduler), pipeline.unet.eval()
    with torch.no_grad():
        means = torch.cat([autoencoder.encode_moments(part)[:, 0] for part in pixels.split(ENCODING_BATCH)])
    known = model_labels(labels, unet.config.num_classes)
    latents = autoencoder.normalise(means)
    return spread_over_eta(unet, process.path, process.prediction_type, latents, known, config.timesteps, config.draws)


def draws(config: DrawsConfig) -> None:
    pixels, labels, _ = load_pixels(config.images)
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[: config.count]
    numbers = torch.tensor([-1 if label is None else label for label in labels])
    print("| spread ratio, gain | " + " | ".join(f"t = {t}" for t in config.timesteps) + " |")
    print("|---" * (len(config.timesteps) + 1) + "|")
    for name in config.models:
        found = measure(name, pixels[chosen], numbers[chosen], config)
        print(f"| {name} | " + " | ".join(f"{at.ratio:.2f}, {at.gain:.2f}" for at in found.values()) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(DrawsConfig, draws, __doc__))
