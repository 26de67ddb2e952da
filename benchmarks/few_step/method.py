"""The base class of few-step methods, and their training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm_smd.autoencoder import sample_latents
from ldm_smd.training.ema import EMA

from .network import Start

CHECK_EVERY = 200
"""Steps between two checks of the loss, for which the host waits for the device."""


class Method:
    """A method to train a few-step generator.

    Attributes:
        networks: networks that are trained. The moving average of "model" is used for sampling.
        settings: an instance of ``Settings``.
        progress: finished fraction of the training, in [0, 1), set before each step.
        group: number of consecutive rows of a batch with the same label.
        cycle: number of steps after which the work repeats, for timing.
        evaluations: evaluations of the network in a step of sampling.
    """

    Settings: type
    SEARCH: dict[str, list]
    group = 1
    cycle = 1
    evaluations = 1

    def __init__(self, start: Start, settings: Any) -> None:
        self.start, self.settings = start, settings
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.rates: dict[str, float] = {}
        self.progress = 0.0
        self.count = 0

    @property
    def parts(self) -> list[tuple[float, float]]:
        """Start and end, as fractions of the images, of each part of the training with work of its own."""
        return [(0.0, 1.0)]

    @property
    def schedule(self) -> tuple[float, float]:
        """Start and end of the current learning rate schedule, as fractions of the images."""
        return 0.0, 1.0

    def add(self, name: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.networks[name], self.optimizers[name] = network, optimizer
        self.rates[name] = optimizer.param_groups[0]["lr"]

    def descend(self, name: str, loss: torch.Tensor, rate: float) -> None:
        """Update one network. Gradients of the others, which the loss may depend on, are discarded."""
        for network in self.networks.values():
            network.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.networks[name].parameters(), 1.0)
        self.optimizers[name].param_groups[0]["lr"] = self.rates[name] * rate
        self.optimizers[name].step()

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        """Take a training step; returns scalars on the device. ``rate`` in [0, 1] multiplies all learning rates."""
        raise NotImplementedError

    def sample(
        self,
        network: nn.Module,
        noise: torch.Tensor,
        labels: torch.Tensor,
        steps: int,
        generator: torch.Generator,
        first: float | None = None,
    ) -> torch.Tensor:
        """Sample x_0 (N, C, h, w).

        Args:
            steps: evaluations of ``network``, at least ``evaluations``.
            noise: standard normal noise of that shape. If ``first`` is given: x_t = a x_0 + s eps with s / a = first.
        """
        raise NotImplementedError


@dataclass
class Training:
    """Length of a training run and its learning rate schedule."""

    images: int
    batch: int = 32
    seed: int = 0
    warmup_images: int = 0
    """0: 50 steps, at least 2,000 images."""
    ema_halflife_images: int = 0
    """0: 2 % of the images of a schedule, at least 2,000."""
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        self.warmup_images = self.warmup_images or max(2000, 50 * self.batch)

    def halflife(self, schedule: tuple[float, float]) -> int:
        """Return the half-life of the moving average, in images, for a schedule given by its start and end as fractions."""
        return self.ema_halflife_images or max(2000, int((schedule[1] - schedule[0]) * self.images) // 50)

    def factor(self, seen: int, schedule: tuple[float, float] = (0.0, 1.0)) -> float:
        """Return the factor of the learning rate: linear warm-up, constant, then linear cool-down over the last half of the
        ``schedule``, given by its start and end as fractions of the training."""
        start, end = (fraction * self.images for fraction in schedule)
        warm = (seen - start + self.batch) / max(self.warmup_images, self.batch)
        cool = (end - seen) / max(0.5 * (end - start), self.batch)
        return min(1.0, warm, cool)


class Latents:
    """All latents of a data set in the memory of a device.

    Args:
        moments: (N, 2, C, h, w), means and log-variances of normalised latents, or means alone (N, 1, C, h, w).
        labels: (N,).
        null: the label of no class.
    """

    def __init__(self, moments: torch.Tensor, labels: torch.Tensor, null: int) -> None:
        order = labels.argsort(stable=True)
        self.moments, self.labels, self.null = moments[order], labels[order], null
        self.counts = torch.bincount(self.labels, minlength=null + 1)
        self.starts = self.counts.cumsum(0) - self.counts

    def batch(self, size: int, group: int, dropout: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw (x_0, labels), where ``group`` consecutive rows have the same label."""
        options: dict[str, Any] = {"generator": generator, "device": self.labels.device}
        first = torch.randint(len(self.labels), (size // group,), **options)
        chosen = first
        if group > 1:
            label = self.labels[first][:, None]
            within = torch.rand(len(first), group, **options)
            chosen = (self.starts[label] + (within * self.counts[label]).long()).flatten()
        dropped = torch.rand(len(first), **options) < dropout
        labels = torch.where(dropped, self.null, self.labels[first]).repeat_interleave(group)
        moments = self.moments[chosen]
        noise = torch.randn(moments[:, 0].shape, **options) if moments.shape[1] == 2 else None
        return sample_latents(moments, noise=noise), labels


def train(method: Method, latents: Latents, training: Training) -> nn.Module:
    """Train a method; returns the moving average of its "model". Raises FloatingPointError if a loss is not finite."""
    generator = torch.Generator(latents.labels.device).manual_seed(training.seed)
    torch.manual_seed(training.seed)
    model = method.networks["model"]
    ema = EMA(model, training.halflife(method.schedule))
    size = max(training.batch // method.group, 1) * method.group
    for step, seen in enumerate(range(0, training.images, size)):
        method.progress, method.count = seen / training.images, step
        x0, labels = latents.batch(size, method.group, training.label_dropout, generator)
        losses = method.step(x0, labels, generator, training.factor(seen, method.schedule))
        ema.halflife_images = training.halflife(method.schedule)
        ema.update(model, size, seen + size)
        if step % CHECK_EVERY == 0 or seen + size >= training.images:
            for name, value in losses.items():
                if not math.isfinite(float(value)):
                    title = type(method).__name__
                    raise FloatingPointError(f"{title}: expected a finite {name}, found {float(value)} at {seen} images")
    return ema.model


def squares(x: torch.Tensor) -> torch.Tensor:
    """Return |x|^2 of each row, (N,)."""
    return x.square().flatten(1).sum(dim=1)


def column(x: torch.Tensor) -> torch.Tensor:
    """Reshape (N,) to (N, 1, 1, 1)."""
    return x.view(-1, 1, 1, 1)
