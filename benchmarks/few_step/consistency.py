"""Easy consistency tuning (ECT, arXiv 2406.14548): tunes a diffusion model to predict the same x_0 at two noise levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .method import Method, column, squares
from .network import Start, denoiser, levels, resample

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
        self.q, self.stages = (int(number) for number in settings.schedule.split(","))
        self.add("model", network, torch.optim.RAdam(network.parameters(), lr=settings.learning_rate))

    def lower_level(self, t: torch.Tensor) -> torch.Tensor:
        """Return r(t) = max(0, t (1 - (1 + 8 sigmoid(-t / 2)) / q^stage))."""
        stage = 1 + int(self.progress * self.stages)
        decrease = (1 + 8 * torch.sigmoid(-t / 2)) / self.q**stage
        return (t * (1 - decrease)).clamp_min(0)

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        settings, model = self.settings, self.networks["model"]
        logarithm = torch.randn(len(x0), generator=generator, device=x0.device)
        t = (settings.mean + settings.deviation * logarithm).exp()
        r = self.lower_level(t)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        with torch.no_grad():
            target = self.denoise(model, x0, eps, r, labels)
        error = squares(self.denoise(model, x0, eps, t, labels) - target)
        c = max(settings.c, 1e-4)  # the norm has no gradient at 0
        loss = (((error + c**2).sqrt() - c) / (t - r)).mean()
        self.descend("model", loss, rate)
        return {"loss": loss.detach()}

    def denoise(
        self, model: nn.Module, x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return D(x_0 + sigma eps, sigma), which is x_0 for sigma = 0."""
        a, s = levels(sigma)
        found = model.clean(a * x0 + s * eps, sigma.clamp_min(1e-4), labels)
        return torch.where(column(sigma) > 0, found, x0)

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
