"""Inductive moment matching (IMM, arXiv 2503.07565): draws made from time t must be distributed like those from r < t."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from .method import Method
from .network import Denoiser, Start, denoiser, levels

MIN_TIME, MAX_TIME = 0.006, 0.994
"""Range of times on the straight path, t = sigma / (1 + sigma)."""
MAX_SIGMA = 160.0
MIN_DISTANCE = 1e-8


def transition(
    model: Denoiser, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a DDIM step from sigma t to sigma s < t (latents have variance 1 at both); returns x_s and the coefficient c of v:

    x_s = (a_t a_s + s_t s_s) x_t - c v,    c = a_s s_t - a_t s_s
    """
    (a_t, s_t), (a_s, s_s) = levels(t), levels(s)
    c = a_s * s_t - a_t * s_s
    return (a_t * a_s + s_t * s_s) * x_t - c * model(x_t, t, labels, s / (1 + s)), c


def kernel_loss(first: torch.Tensor, second: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return the squared MMD between groups of M draws (G, M, D), with k(x, y) = exp(-|x - y| / (c D)) and c (G,):

    mean k(x_j, x_k) + mean k(y_j, y_k) - 2 mean k(x_j, y_k)
    """

    def mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # The square root has no gradient at 0, the distance of a draw to itself.
        distance = (x[:, :, None] - y[:, None]).square().sum(dim=3).clamp_min(MIN_DISTANCE**2).sqrt()
        return (-distance / (c.view(-1, 1, 1) * x.shape[2])).exp().mean(dim=(1, 2))

    return mean(first, first) + mean(second, second) - 2 * mean(first, second)


@dataclass
class IMMSettings:
    """Settings of the paper for CIFAR-10, as in other implementations, but with k = 12 from ImageNet in place of 15, because r
    closer to t needs longer training."""

    learning_rate: float = 1e-4
    particles: int = 4
    """Size of a group of draws with the same label, t, s and r."""
    k: int = 12
    """The sigma of r is smaller than that of t by MAX_SIGMA / 2^k."""
    a: float = 1.0
    b: float = 5.0
    middle: float = 1.4
    """Sigma of the second of two steps."""
    smooth: bool = True
    """Make the network smooth in time, because r may be nearer to t than a timestep."""


class IMM(Method):
    """IMM. With x_r the DDIM step from x_t to r with the true x_0, and both mapped to s,

    loss = w(t) MMD^2(f(x_t, t -> s), sg f(x_r, r -> s)),
    w = 1/2 sigmoid(b - log snr) (-d log snr / dt) (1 - t)^a / ((1 - t)^2 + t^2)
    """

    Settings = IMMSettings
    SEARCH = {
        "learning_rate": [1e-4, 3e-4, 6e-4, 1e-3],
        "particles": [4, 8, 16, 32],
        "k": [8, 10, 12, 15],
        "a": [1.0, 2.0],
        "b": [4.0, 5.0],
        "middle": [0.8, 1.4, 3.0],
        "smooth": [True, False],
    }

    def __init__(self, start: Start, settings: IMMSettings) -> None:
        super().__init__(start, settings)
        network = denoiser(start, second=True, smooth=settings.smooth)
        self.group = settings.particles
        self.add("model", network, torch.optim.RAdam(network.parameters(), lr=settings.learning_rate))

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        settings, model, size = self.settings, self.networks["model"], self.group
        groups = len(x0) // size
        uniform = torch.rand(2, groups, generator=generator, device=x0.device)
        t = MIN_TIME + (MAX_TIME - MIN_TIME) * uniform[0]
        s = MIN_TIME + (t - MIN_TIME) * uniform[1]
        sigma_t, sigma_s = t / (1 - t), s / (1 - s)
        sigma_r = torch.maximum(sigma_t - MAX_SIGMA / 2**settings.k, sigma_s)

        each_t, each_s, each_r = (sigma.repeat_interleave(size) for sigma in (sigma_t, sigma_s, sigma_r))
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        (a_t, s_t), (a_r, s_r) = levels(each_t), levels(each_r)
        far, c = transition(model, a_t * x0 + s_t * eps, each_t, each_s, labels)
        with torch.no_grad():
            near, _ = transition(model, a_r * x0 + s_r * eps, each_r, each_s, labels)

        log_snr = -2 * sigma_t.log()
        slope = 2 / (t * (1 - t))
        weight = 0.5 * torch.sigmoid(settings.b - log_snr) * slope * (1 - t) ** settings.a / ((1 - t) ** 2 + t**2)
        each = kernel_loss(far.flatten(1).unflatten(0, (groups, size)), near.flatten(1).unflatten(0, (groups, size)), c[::size])
        # In many dimensions the kernel is nearly linear, and the loss of order 1 / D. Scale it to order 1, or Adam's epsilon
        # would matter.
        loss = (weight * each).mean() * x0[0].numel()
        self.descend("model", loss, rate)
        return {"loss": loss.detach()}

    def nodes(self, steps: int, first: float | None = None) -> torch.Tensor:
        """Return the sigmas from the largest, or ``first``, to the smallest: uniform in t, or with the middle one for two
        steps."""
        initial = MAX_TIME if first is None else first / (1 + first)
        t = torch.linspace(initial, MIN_TIME, steps + 1, device=self.start.device)
        if steps == 2 and first is None:
            t[1] = self.settings.middle / (1 + self.settings.middle)
        return t / (1 - t)

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
        x, nodes = noise, self.nodes(steps, first)
        for t, s in pairwise(nodes):
            x = transition(network, x, t.expand(len(x)), s.expand(len(x)), labels)[0]
        return x * levels(nodes[-1:])[0].reciprocal()
