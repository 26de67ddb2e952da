"""Easy consistency tuning (ECT, arXiv 2406.14548): a diffusion model is tuned to give one x_0 at two noises of a path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .method import Method, column, squares
from .network import Start, denoiser, levels, resample

LARGEST = 80.0
SPREAD = {1: 1.0, 2: 1.0, 4: 3.5, 8: 8.0, 16: 14.0}
"""How far the inner nodes reach from the middle one, as a factor, for each number of steps."""


@dataclass
class ECTSettings:
    """The paper's for CIFAR-10, with its sigmas doubled: its data has deviation 0.5, and ours 1."""

    learning_rate: float = 1e-4
    mean: float = -0.4
    deviation: float = 2.0
    """Distribution of log sigma."""
    q: float = 256.0
    """Distance of r from t: for q = 2, r = 0 at first; for 256, the paper's one-hour recipe, r is close to t from the start."""
    stages: int = 1
    """Number of stages of the training; q is raised to the power of the stage."""
    c: float = 0.0
    """Constant of the pseudo-Huber loss; 0: the norm."""
    middle: float = 1.64
    """Sigma of the second of two steps; the middle one of more."""


class ECT(Method):
    """With one noise for both, and D as a diffusion model's denoiser,

    loss = (sqrt(|D(x + t eps, t) - sg D(x + r eps, r)|^2 + c^2) - c) / (t - r),    D(x, 0) = x
    """

    Settings = ECTSettings
    SEARCH = {
        "learning_rate": [5e-5, 1e-4, 3e-4, 6e-4],
        "q": [2.0, 16.0, 256.0],
        "stages": [1, 4, 8],
        "mean": [-0.4, 0.4, 1.2],
        "c": [0.0, 0.06, 1.0],
        "middle": [0.8, 1.64, 3.0],
    }

    def __init__(self, start: Start, settings: ECTSettings) -> None:
        super().__init__(start, settings)
        network = denoiser(start)
        self.add("model", network, torch.optim.RAdam(network.parameters(), lr=settings.learning_rate))

    def nearer(self, t: torch.Tensor) -> torch.Tensor:
        """r(t) = max(0, t (1 - (1 + 8 sigmoid(-t / 2)) / q^stage))"""
        stage = 1 + int(self.progress * self.settings.stages)
        share = (1 + 8 * torch.sigmoid(-t / 2)) / self.settings.q**stage
        return (t * (1 - share)).clamp_min(0)

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        settings, model = self.settings, self.networks["model"]
        logarithm = torch.randn(len(x0), generator=generator, device=x0.device)
        t = (settings.mean + settings.deviation * logarithm).exp()
        r = self.nearer(t)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        with torch.no_grad():
            target = self.at(model, x0, eps, r, labels)
        error = squares(self.at(model, x0, eps, t, labels) - target)
        c = max(settings.c, 1e-4)  # the norm has no gradient at 0
        loss = (((error + c**2).sqrt() - c) / (t - r)).mean()
        self.descend("model", loss, rate)
        return {"loss": loss.detach()}

    def at(
        self, model: nn.Module, x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """D(x_0 + sigma eps, sigma), which is x_0 where sigma is 0."""
        a, s = levels(sigma)
        found = model.clean(a * x0 + s * eps, sigma.clamp_min(1e-4), labels)
        return torch.where(column(sigma) > 0, found, x0)

    def nodes(self, steps: int) -> torch.Tensor:
        """Sigmas of the steps: the largest, and the others in geometric order around the middle one."""
        spread = SPREAD.get(steps, 14.0)
        powers = torch.linspace(1, -1, steps - 1, device=self.start.device) if steps > 2 else torch.zeros(steps - 1)
        inner = self.settings.middle * spread ** powers.to(self.start.device)
        return torch.cat((torch.full((1,), LARGEST, device=self.start.device), inner))

    def sample(
        self,
        network: nn.Module,
        noise: torch.Tensor,
        labels: torch.Tensor,
        steps: int,
        generator: torch.Generator,
        first: float | None = None,
    ) -> torch.Tensor:
        return resample(
            lambda x, sigma: network.clean(x, sigma, labels), noise, self.nodes(steps).clamp_max(first or LARGEST), generator
        )
