"""The random numbers of a training step: of the whole batch on every process, so that none depends on how many there are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch


@dataclass
class Draws:
    """One row for each picture of the batch.

    Attributes:
        posterior: of the latents given the picture, (B, C, h, w), unit normal.
        t: timesteps, (B,).
        eps: noise, (B, C, h, w).
        eta: of the mixture's draws, (B, M, C, h, w); M is 0 for a Gaussian model.
        dropped: whether the label is to be left out, (B,).
        unlike: whether the image embedding is to be left out, (B,).
    """

    posterior: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    eta: torch.Tensor
    dropped: torch.Tensor
    unlike: torch.Tensor

    def rows(self, start: int, stop: int) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[start:stop] for field in fields(self)})


def draw(generator: torch.Generator, shape: tuple[int, ...], draws: int, num_timesteps: int, label_dropout: float) -> Draws:
    """For a batch of latents of ``shape`` (B, C, h, w), on the generator's device."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    return Draws(
        posterior=torch.randn(shape, **options),
        t=torch.randint(num_timesteps, shape[:1], **options),
        eps=torch.randn(shape, **options),
        eta=torch.randn((shape[0], draws, *shape[1:]), **options),
        dropped=torch.rand(shape[:1], **options) < label_dropout,
        unlike=torch.rand(shape[:1], **options) < label_dropout,
    )


def step_seed(*numbers: int) -> int:
    """A 64-bit seed that is a function of these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
