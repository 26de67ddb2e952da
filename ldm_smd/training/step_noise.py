"""Random numbers of a training step.

They are drawn in blocks of images with a seed each. So they do not depend on the number of processes, and each process draws
little more than those of its own images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch

from ..diffusion.process import GaussianPath

BLOCK = 64
"""Images of a block. With another size, trainings would draw other numbers."""
NOISE, SECOND_VIEW, PURE_NOISE, DROPOUT, SIMULATION = range(5)
"""Purposes of random numbers, for seeds (seed, images_seen, number of the update, purpose, block)."""


@dataclass
class StepNoise:
    """Random numbers of a step, with one row per image of the batch.

    Attributes:
        posterior: unit normal, to sample the latents from the encoder's posterior, (B, C, h, w).
        t: timesteps, (B,).
        eps: noise, (B, C, h, w).
        eta: random input of the mixture, (B, M, C, h, w); M is 0 for a Gaussian model.
        drop_label: whether to drop the label, (B,).
        drop_embedding: whether to drop the image embedding, (B,).
        coarse: uniform on [0, 1), (B,): decides whether a coarse label is taken, and which.
    """

    posterior: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    eta: torch.Tensor
    drop_label: torch.Tensor
    drop_embedding: torch.Tensor
    coarse: torch.Tensor

    def rows(self, start: int, stop: int) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[start:stop] for field in fields(self)})


def draw_step_noise(
    generator: torch.Generator,
    shape: tuple[int, ...],
    draws: int,
    path: GaussianPath,
    label_dropout: float,
    timestep_shift: float = 1.0,
) -> StepNoise:
    """Draw the random numbers for a batch of latents of ``shape`` (B, C, h, w), on the generator's device."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    return StepNoise(
        posterior=torch.randn(shape, **options),
        t=path.random_t(shape[0], timestep_shift, **options),
        eps=torch.randn(shape, **options),
        eta=torch.randn((shape[0], draws, *shape[1:]), **options),
        drop_label=torch.rand(shape[:1], **options) < label_dropout,
        drop_embedding=torch.rand(shape[:1], **options) < label_dropout,
        coarse=torch.rand(shape[:1], **options),
    )


def draw_in_blocks(
    rows: range,
    count: int,
    seed: Sequence[int],
    device: torch.device,
    draw: Callable[[torch.Generator, int], Iterable[torch.Tensor]],
) -> list[torch.Tensor]:
    """Draw random numbers for the ``rows`` of a batch of ``count`` images. ``draw`` returns tensors for a number of images."""
    parts = []
    for block in range(rows.start // BLOCK, -(-rows.stop // BLOCK)):
        first = block * BLOCK
        generator = torch.Generator(device).manual_seed(step_seed(*seed, block))
        drawn = draw(generator, min(BLOCK, count - first))
        parts.append([values[max(rows.start - first, 0) : rows.stop - first] for values in drawn])
    return [torch.cat(values) for values in zip(*parts)]


def step_seed(*values: int) -> int:
    """Hash integers to a 64-bit seed."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0])
