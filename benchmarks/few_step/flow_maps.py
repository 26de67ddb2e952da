"""Methods that learn average velocities of the flow from noise to data: improved MeanFlow (arXiv 2512.02012), AlphaFlow
(2510.20771) and shortcut models (2410.12557).

Times are those of the straight path z_t = (1 - t) x_0 + t eps with velocity eps - x_0. u(z_t, r, t) is the average velocity
from t to r <= t. The instantaneous velocity u(z_t, t, t) follows exactly from a Gaussian model of another path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from .method import Method, column, squares
from .network import Denoiser, Start, denoiser

MIN_TIME, MAX_TIME = 1e-4, 0.999
"""Range of times that the network is evaluated at."""
DIFFERENCE = 0.005
"""Half of the step of central differences."""
SNAP = 0.005
"""Distance of alpha from 1 below which it is set to 1."""
TIMES = {"ImageNet": (-0.4, -0.4, 1.0), "CIFAR-10": (-0.6, -4.0, 1.6), "whole way": (0.4, -4.0, 1.6)}
"""Distributions of times: means of logit(t) and logit(r), and their standard deviation. If the means are equal, t is the larger
of the two times; in all cases r is the smaller one. The first is that of improved MeanFlow, the second that of MeanFlow. With
the first, the full interval from t = 1 to r = 0 is hardly ever trained: after short trainings on the ring of 8, one step of
AlphaFlow put 6 % of the points into modes with it, and 93 % with the third."""


def average_velocity(model: Denoiser, z: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return u(z_t, r, t). Before training it is the velocity at t, independent of r.

    With a = (1 - t) / n, s = t / n, n^2 = (1 - t)^2 + t^2,

    x_t = z_t / n,    u = (s - a) x_t + (a + s) v(x_t)
    """
    inside = t.clamp(MIN_TIME, MAX_TIME)
    length = column(((1 - inside) ** 2 + inside**2).sqrt())
    x = z / length
    v = model(x, inside / (1 - inside), labels, t - r)
    return (column(2 * inside - 1) * x + v) / length


@dataclass
class FlowSettings:
    learning_rate: float = 1e-4
    times: str = "whole way"
    """A name in TIMES."""
    share_equal: float = 0.5
    """Fraction of rows with r = t."""


class FlowMap(Method):
    """Base class of the three methods. In a batch, rows with r = t come first, then those with r < t."""

    Settings = FlowSettings

    def __init__(self, start: Start, settings: FlowSettings) -> None:
        super().__init__(start, settings)
        network = denoiser(start, second=True, smooth=True)
        rate = settings.learning_rate
        self.add("model", network, torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.95), fused=True))

    def times(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Draw r and t for a batch; returns them and the number of rows with r = t."""
        normal = torch.randn(2, count, generator=generator, device=self.start.device)
        mean, mean_r, deviation = TIMES[self.settings.times]
        one, other = (mean + deviation * normal[0]).sigmoid(), (mean_r + deviation * normal[1]).sigmoid()
        t, r = torch.maximum(one, other) if mean == mean_r else one, torch.minimum(one, other)
        equal = round(count * self.settings.share_equal)
        return torch.cat((t[:equal], r[equal:])), t, equal

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        r, t, equal = self.times(len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        z, v = (1 - column(t)) * x0 + column(t) * eps, eps - x0
        losses = self.losses(z, v, r, t, labels, equal)
        self.descend("model", losses.mean(), rate)
        return {"loss": losses.detach().mean()}

    def losses(
        self, z: torch.Tensor, v: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, equal: int
    ) -> torch.Tensor:
        """Return losses (N,), given the velocity v = eps - x_0."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self,
        network: nn.Module,
        noise: torch.Tensor,
        labels: torch.Tensor,
        steps: int,
        generator: torch.Generator,
        first: float | None = None,
    ) -> torch.Tensor:
        """Take equal steps z_r = z_t - (t - r) u(z_t, r, t) from t = 1, or from the time where s / a is ``first``."""
        initial = 1.0 if first is None else first / (1 + first)
        z = noise * ((1 - initial) ** 2 + initial**2) ** 0.5
        for index in range(steps):
            t = torch.full((len(z),), initial * (1 - index / steps), device=z.device)
            r = t - initial / steps
            z = z - column(t - r) * average_velocity(network, z, r, t, labels)
        return z


@dataclass
class MeanFlowSettings(FlowSettings):
    power: float = 1.0
    """Exponent of the adaptive weight. 0: squared error."""
    derivative: str = "jvp"
    """How to compute du/dt: "jvp" (forward-mode derivative), or "difference", the central difference of TiM (arXiv
    2509.04394)."""


class MeanFlow(FlowMap):
    """Improved MeanFlow without its second head. The average velocity satisfies u = v - (t - r) du/dt along the path, so

        V = u + (t - r) sg(du/dt),    loss = |V - (eps - x_0)|^2 / sg(|V - (eps - x_0)|^2 + 0.01)^power

    where du/dt is the derivative in the direction (u(z, t, t), 1), the velocity that the model itself predicts."""

    Settings = MeanFlowSettings
    SEARCH = {
        "learning_rate": [1e-4, 3e-4, 6e-4, 1e-3],
        "share_equal": [0.25, 0.5, 0.75],
        "times": list(TIMES),
        "power": [0.0, 0.5, 1.0],
    }

    def losses(
        self, z: torch.Tensor, v: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, equal: int
    ) -> torch.Tensor:
        model = self.networks["model"]
        u = average_velocity(model, z[:equal], r[:equal], t[:equal], labels[:equal])
        late = slice(equal, None)
        far, derivative = self.derivative(model, z[late], r[late], t[late], labels[late])
        errors = squares(torch.cat((u, far + column(t - r)[late] * derivative)) - v)
        return errors / (errors.detach() + 0.01) ** self.settings.power

    def derivative(
        self, model: Denoiser, z: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return u(z, r, t), and du/dt along the path without gradient."""
        with torch.no_grad():
            velocity = average_velocity(model, z, t, t, labels)
        if self.settings.derivative == "difference":
            with torch.no_grad():
                ends = [
                    average_velocity(model, z + sign * DIFFERENCE * velocity, r, t + sign * DIFFERENCE, labels)
                    for sign in (1, -1)
                ]
            return average_velocity(model, z, r, t, labels), (ends[0] - ends[1]) / (2 * DIFFERENCE)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
            u, derivative = jvp(lambda z, t: average_velocity(model, z, r, t, labels), (z, t), (velocity, torch.ones_like(t)))
        return u, derivative.detach()


@dataclass
class AlphaFlowSettings(FlowSettings):
    last_alpha: float = 0.02
    steepness: float = 25.0
    centre: float = 0.5
    """Fraction of the training at which alpha is 0.5; that of the paper, which starts from scratch. A Gaussian model is already
    what alpha = 1 leads to."""
    limit: float = 4.0
    """Targets are clipped to [-limit, limit]."""


class AlphaFlow(FlowMap):
    """AlphaFlow. With d = alpha (t - r), where alpha goes from 1 (flow matching) to nearly 0 (MeanFlow),

    goal = (d v + (t - r - d) sg u(z - d v, r, t - d)) / (t - r),    v = eps - x_0,
    loss = alpha e / sg(e + 0.001),    e = mean (u - goal)^2
    """

    Settings = AlphaFlowSettings
    SEARCH = {
        "learning_rate": [1e-4, 3e-4, 6e-4, 1e-3],
        "share_equal": [0.25, 0.5, 0.75],
        "times": list(TIMES),
        "last_alpha": [0.02, 0.1, 0.25],
        "steepness": [10.0, 25.0],
        "centre": [0.1, 0.25, 0.5],
    }

    def alpha(self) -> float:
        """Return 1 - sigmoid of the progress; values within SNAP of 1 become 1."""
        alpha = 1 - 1 / (1 + math.exp(-self.settings.steepness * (self.progress - self.settings.centre)))
        return 1.0 if alpha > 1 - SNAP else max(alpha, self.settings.last_alpha)

    def losses(
        self, z: torch.Tensor, v: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, equal: int
    ) -> torch.Tensor:
        model, alpha = self.networks["model"], self.alpha()
        late = slice(equal, None)
        goal, weight = v, torch.ones_like(t)
        if alpha < 1 and equal < len(t):
            far = self.goal(model, z[late], v[late], r[late], t[late], labels[late], alpha)
            goal = torch.cat((v[:equal], far.clamp(-self.settings.limit, self.settings.limit)))
            weight[late] = alpha
        errors = squares(average_velocity(model, z, r, t, labels) - goal) / z[0].numel()
        return weight * errors / (errors.detach() + 1e-3)

    @torch.no_grad()
    def goal(
        self,
        model: Denoiser,
        z: torch.Tensor,
        v: torch.Tensor,
        r: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor,
        alpha: float,
    ) -> torch.Tensor:
        d = alpha * (t - r)
        rest = average_velocity(model, z - column(d) * v, r, t - d, labels)
        return alpha * v + (1 - alpha) * rest


@dataclass
class ShortcutSettings(FlowSettings):
    share_equal: float = 0.875
    learning_rate: float = 1e-4
    limit: float = 4.0


class Shortcut(AlphaFlow):
    """Shortcut models. One step must equal two steps of half its size by the model itself:

        goal = (u(z, m, t) + u(z - (t - m) u(z, m, t), r, m)) / 2,    m = (t + r) / 2

    for an eighth of the rows, with squared errors. Unlike in the paper, times are continuous, and the half steps are taken with
    the model, not with its moving average."""

    Settings = ShortcutSettings
    SEARCH = {
        "learning_rate": [1e-4, 3e-4, 6e-4, 1e-3],
        "share_equal": [0.5, 0.75, 0.875],
        "times": list(TIMES),
        "limit": [4.0, 8.0],
    }

    def losses(
        self, z: torch.Tensor, v: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, equal: int
    ) -> torch.Tensor:
        model, late = self.networks["model"], slice(equal, None)
        with torch.no_grad():
            middle = (t + r)[late] / 2
            first = average_velocity(model, z[late], middle, t[late], labels[late])
            far = self.goal(model, z[late], first, r[late], t[late], labels[late], 0.5)
        goal = torch.cat((v[:equal], far.clamp(-self.settings.limit, self.settings.limit)))
        return squares(average_velocity(model, z, r, t, labels) - goal) / z[0].numel()
