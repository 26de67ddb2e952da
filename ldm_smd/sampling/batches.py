"""Sampling of any number of images, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image

from ..errors import UserError
from ..pipelines import SMDPipeline, seeded_generators
from ..progress import progress


@dataclass(frozen=True)
class SamplingOptions:
    """Arguments of ``SMDPipeline`` for any number of images.

    Attributes:
        seed: seed of the first image. Image i has seed ``seed + i``, whatever the batch size.
        image: image to start from, one for all, or a tensor (N, 3, H, W) with one per sample.
        image_embeds: embedding of a prompt for all samples, (1, D), or one per sample, (N, D).
        steps, guidance_scale, guidance_interval, height, width, strength, timestep_shift: see the pipeline.
    """

    steps: int
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    seed: int = 0
    batch_size: int = 64
    height: int | None = None
    width: int | None = None
    image: Image.Image | torch.Tensor | None = None
    strength: float = 1.0
    image_embeds: torch.Tensor | None = None
    timestep_shift: float | None = None


def sample_pixels(
    pipeline: SMDPipeline, labels: list[int] | None, count: int, options: SamplingOptions, description: str
) -> torch.Tensor:
    """Sample ``count`` images, float (N, 3, H, W) in [0, 1]."""
    return torch.cat(list(sample_batches(pipeline, labels, range(count), options, description)))


def sample_batches(
    pipeline: SMDPipeline, labels: list[int] | None, indices: range, options: SamplingOptions, description: str
) -> Iterator[torch.Tensor]:
    """Yield images number ``indices`` of ``sample_pixels``, in batches."""
    pipeline.set_progress_bar_config(disable=True)
    with progress(len(indices), 0, description) as bar:
        for start in range(indices.start, indices.stop, options.batch_size):
            stop = min(start + options.batch_size, indices.stop)
            image, embeds = options.image, options.image_embeds
            if embeds is not None:
                embeds = embeds.expand(stop - start, -1) if len(embeds) == 1 else embeds[start:stop]
            try:
                images = pipeline(
                    None if labels is None else labels[start:stop],
                    batch_size=stop - start,
                    num_inference_steps=options.steps,
                    guidance_scale=options.guidance_scale,
                    guidance_interval=options.guidance_interval,
                    height=options.height,
                    width=options.width,
                    generator=seeded_generators(range(options.seed + start, options.seed + stop)),
                    output_type="pt",
                    image=image[start:stop] if isinstance(image, torch.Tensor) else image,
                    strength=options.strength,
                    image_embeds=embeds,
                    timestep_shift=options.timestep_shift,
                )[0]
            except ValueError as error:  # an argument that this model or scheduler does not support
                raise UserError(str(error)) from error
            yield images.cpu()
            bar.update(stop - start)
