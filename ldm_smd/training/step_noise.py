"""The random numbers of a training step: of the whole batch on every process, so that none depends on how many there are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch

from ..diffusion.process import GaussianPath


@dataclass
class StepNoise:
    """The random numbers of a step, one row for each image of the batch.

    Attributes:
        posterior: of the latents given the image, (B, C, h, w), unit normal.
        t: timesteps, (B,).
        eps: noise, (B, C, h, w).
        eta: of the mixture's draws, (B, M, C, h, w); M is 0 for a Gaussian model.
        drop_label: whether the label is to be left out, (B,).
        drop_embedding: whether the image embedding is to be left out, (B,).
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
    generator: torch.Generator, shape: tuple[int, ...], draws: int, path: GaussianPath, label_dropout: float
) -> StepNoise:
    """Draw for a batch of latents of ``shape`` (B, C, h, w), on the generator's device."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    return StepNoise(
        posterior=torch.randn(shape, **options),
        t=path.random_t(shape[0], **options),
        eps=torch.randn(shape, **options),
        eta=torch.randn((shape[0], draws, *shape[1:]), **options),
        drop_label=torch.rand(shape[:1], **options) < label_dropout,
        drop_embedding=torch.rand(shape[:1], **options) < label_dropout,
        coarse=torch.rand(shape[:1], **options),
    )


def step_seed(*values: int) -> int:
    """Return a 64-bit seed that is a function of these integers."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0])
