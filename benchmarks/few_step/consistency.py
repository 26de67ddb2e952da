"""Easy consistency tuning (ECT, arXiv 2406.14548): tunes a diffusion model to predict the same x_0 at two noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, nn

from .method import Method, column, squares
from .network import Start, denoiser, levels, resample

Clean = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_t, sigma (N,)) -> x_0."""
MAX_SIGMA = 80.0
NODE_RANGE = {1: 1.0, 2: 1.0, 4: 3.5, 8: 8.0, 16: 14.0}
"""Ratio of the outermost inner sigma to the middle one, for each number of steps."""


@dataclass
class ECTSettings:
    """Settings of the paper for CIFAR-10, with doubled sigmas: its data have standard deviation 0.5, and ours 1."""

    learning_rate: float = 1e-4
    mean: float = -0.4
    deviation: float = 2.0
    """Mean and standard deviation of log sigma."""
    schedule: str = "256, 1"
    """q, which is raised to the power of the stage, and the number of stages. They control the distance of r from t. "256, 1"
    is the one-hour recipe of the paper, with r close to t from the start. "2, 8" is the long one, with r = 0 at first."""
    smooth: bool = True
    """Make the network smooth in time, because r may be nearer to t than a timestep."""
    c: float = 0.0
    """Constant of the pseudo-Huber loss. 0: the norm."""
    middle: float = 1.64
    """Sigma of the second of two steps, or the middle sigma of more steps."""


def consistency_loss(
    clean: Clean, x0: torch.Tensor, settings: ECTSettings, progress: float, generator: Generator
) -> torch.Tensor:
    """Return the mean loss of ECT for a batch. ``progress`` is the finished fraction of the training."""
    logarithm = torch.randn(len(x0), generator=generator, device=x0.device)
    t = (settings.mean + settings.deviation * logarithm).exp()
    r = lower_level(t, settings.schedule, progress)
    eps = torch.randn(x0.shape, generator=generator, device=x0.device)
    with torch.no_grad():
        target = denoise(clean, x0, eps, r)
    error = squares(denoise(clean, x0, eps, t) - target)
    c = max(settings.c, 1e-4)  # the norm has no gradient at 0
    return (((error + c**2).sqrt() - c) / (t - r)).mean()


def lower_level(t: torch.Tensor, schedule: str, progress: float) -> torch.Tensor:
    """Return r(t) = max(0, t (1 - (1 + 8 sigmoid(-t / 2)) / q^stage))."""
    q, stages = (int(number) for number in schedule.split(","))
    stage = 1 + int(progress * stages)
    decrease = (1 + 8 * torch.sigmoid(-t / 2)) / q**stage
    return (t * (1 - decrease)).clamp_min(0)


def denoise(clean: Clean, x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return D(x_0 + sigma eps, sigma), which is x_0 for sigma = 0."""
    a, s = levels(sigma)
    found = clean(a * x0 + s * eps, sigma.clamp_min(1e-4))
    return torch.where(column(sigma) > 0, found, x0)


class ECT(Method):
    """ECT. With the same noise eps at both levels, and the denoiser D of a diffusion model,

    loss = (sqrt(|D(x + t eps, t) - sg D(x + r eps, r)|^2 + c^2) - c) / (t - r),    D(x, 0) = x
    """

    Settings = ECTSettings
    SEARCH = {
        "learning_rate": [5e-5, 1e-4, 3e-4, 6e-4, 1e-3, 2e-3],
        "schedule": ["256, 1", "16, 2", "4, 4", "2, 8"],
        "smooth": [True, False],
        "mean": [-0.4, 0.4, 1.2],
        "c": [0.0, 0.06, 1.0],
        "middle": [0.8, 1.64, 3.0],
    }

    def __init__(self, start: Start, settings: ECTSettings) -> None:
        super().__init__(start, settings)
        network = denoiser(start, smooth=settings.smooth)
        self.add("model", network, torch.optim.RAdam(network.parameters(), lr=settings.learning_rate))

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        model = self.networks["model"]
        loss = consistency_loss(lambda x, sigma: model.clean(x, sigma, labels), x0, self.settings, self.progress, generator)
        self.descend("model", loss, rate)
        return {"loss": loss.detach()}

    def nodes(self, steps: int) -> torch.Tensor:
        """Return the sigmas of the steps: the largest one, then a geometric sequence around the middle one."""
        ratio = NODE_RANGE.get(steps, 14.0)
        powers = torch.linspace(1, -1, steps - 1, device=self.start.device) if steps > 2 else torch.zeros(steps - 1)
        inner = self.settings.middle * ratio ** powers.to(self.start.device)
        return torch.cat((torch.full((1,), MAX_SIGMA, device=self.start.device), inner))

    def sample(
        self,
        network: nn.Module,
        noise: torch.Tensor,
        labels: torch.Tensor,
        steps: int,
        generator: torch.Generator,
        first: float | None = None,
    ) -> torch.Tensor:
        sigmas = self.nodes(steps)
        if first is not None:  # a geometric sequence from the draft's level to the last one
            sigmas = torch.logspace(math.log10(first), float(sigmas[-1].log10()), steps, device=sigmas.device)
            sigmas[0] = first
        return resample(lambda x, sigma: network.clean(x, sigma, labels), noise, sigmas, generator)
