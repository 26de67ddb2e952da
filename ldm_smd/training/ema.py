"""Exponential moving averages of parameters, with time measured in images."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn

from .sharding import distribute_like, gather_into, is_sharded, local

RAMP = 0.05
"""With ``ramp``, the half-life is at most this fraction of the images seen."""
Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """``ema <- ema + (1 - 0.5^(batch / halflife)) * (weights - ema)`` with halflife in images.

    Parameters are averaged and buffers copied. ``model`` is a frozen copy that can be evaluated and saved like any model.

    Args:
        ramp: shorten the half-life at the start, so that the average forgets random initial weights.
    """

    def __init__(self, model: Model, halflife_images: int, ramp: bool = True) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.halflife_images = halflife_images
        self.ramp = ramp
        self._averages: dict[str, torch.Tensor] = dict(self.model.named_parameters())

    def shard_like(self, model: nn.Module, keeps: bool = True) -> None:
        """Shard the averages like ``model``, if it is sharded (FSDP). ``self.model`` then moves to the CPU, and only ``gather``
        updates it; its buffers are not updated. In processes that do not keep it, it has no values."""
        if is_sharded(model):
            weights = dict(model.named_parameters())
            self._averages = {name: distribute_like(average, weights[name]) for name, average in self._averages.items()}
            self.model.to("cpu" if keeps else "meta")

    def rate(self, batch_images: int, images_seen: int) -> float:
        """Return the weight of the current parameters in an update."""
        halflife = min(self.halflife_images, RAMP * images_seen) if self.ramp else self.halflife_images
        return 1.0 - 0.5 ** (batch_images / max(halflife, 1e-8))

    @torch.no_grad()
    def update(self, model: nn.Module, batch_images: int, images_seen: int) -> None:
        """Update the averages after a step. ``images_seen`` includes the ``batch_images`` of the step."""
        weights = dict(model.named_parameters())
        averages, targets = zip(*((local(average), local(weights[name])) for name, average in self._averages.items()))
        torch._foreach_lerp_(averages, targets, self.rate(batch_images, images_seen))
        for average, buffer in zip(self.model.buffers(), model.buffers()):
            if average.device == buffer.device:
                average.copy_(buffer)

    def gather(self) -> Model:
        """Return ``self.model`` with current averages. All processes must call this."""
        gather_into(self.model, self._averages)
        return self.model


class PowerEMA(EMA[Model]):
    """Power-function EMA of EDM2 (arXiv 2312.02696): after t images, the weights after tau images have weight tau^gamma.

        ema <- ema + (1 - (1 - batch / t)^(gamma + 1)) * (weights - ema).

    Its width is a constant fraction of t. Averages of other widths can be made from a few of them afterwards
    (tools/average.py).

    Args:
        sigma_rel: relative width, the standard deviation of tau under this profile divided by t; above 0, below 0.29.
    """

    def __init__(self, model: Model, sigma_rel: float) -> None:
        super().__init__(model, halflife_images=0)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def rate(self, batch_images: int, images_seen: int) -> float:
        return 1.0 - (1.0 - batch_images / images_seen) ** (self.gamma + 1.0)


def gamma_of(sigma_rel: float) -> float:
    """Return gamma for a relative width: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    t = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())
