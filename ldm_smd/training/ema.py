"""Exponential moving average of parameters, keyed by name and measured in images."""

from __future__ import annotations

import copy

import torch
from torch import nn

RAMP = 0.05
"""With ``ramp`` the half-life is at most this share of the images seen."""


class EMA:
    """``ema <- ema + (1 - 0.5^(batch / halflife)) * (weights - ema)`` with halflife in images.

    Parameters are averaged; buffers are copied. ``model`` is a frozen copy that can be evaluated and saved as any other.

    Args:
        ramp: for random initial weights, shorten the half-life at first so that the average forgets them.
    """

    def __init__(self, model: nn.Module, halflife_images: int, ramp: bool = True) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.halflife_images = halflife_images
        self.ramp = ramp
        self._averages = dict(self.model.named_parameters())

    @torch.no_grad()
    def update(self, model: nn.Module, batch_images: int, images_seen: int) -> None:
        """Move towards ``model`` after a step on ``batch_images`` images, the last of ``images_seen`` in all."""
        halflife = min(self.halflife_images, RAMP * images_seen) if self.ramp else self.halflife_images
        rate = 1.0 - 0.5 ** (batch_images / max(halflife, 1e-8))
        weights = dict(model.named_parameters())
        torch._foreach_lerp_(list(self._averages.values()), [weights[name] for name in self._averages], rate)
        for average, buffer in zip(self.model.buffers(), model.buffers()):
            average.copy_(buffer)
