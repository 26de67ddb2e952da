"""Gaussian mixtures as data, and a forward process with few steps."""

from __future__ import annotations

import math

import torch
from gmm_models import PointDenoiser

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from ldm_smd.diffusion.process import DiffusionProcess


def ring(modes: int = 8) -> GaussianMixture:
    """Place modes of standard deviation 0.08 on a circle of radius 2."""
    angles = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    return GaussianMixture.isotropic(2.0 * torch.stack((angles.cos(), angles.sin()), dim=1), 0.08)


def grid(side: int = 5) -> GaussianMixture:
    """Place side x side modes of standard deviation 0.08 at distance 1."""
    coordinates = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    return GaussianMixture.isotropic(torch.cartesian_prod(coordinates, coordinates), 0.08)


def random_mixture(dimensions: int, modes: int = 16, seed: int = 0) -> GaussianMixture:
    """Draw normal means, full covariances a fiftieth as large, and unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(modes, dimensions, generator=generator, dtype=torch.float64)
    roots = torch.randn(modes, dimensions, dimensions, generator=generator, dtype=torch.float64) / math.sqrt(dimensions)
    weights = 0.5 + torch.rand(modes, generator=generator, dtype=torch.float64)
    covariances = 0.02 * roots @ roots.mT + 0.005 * torch.eye(dimensions, dtype=torch.float64)
    return GaussianMixture.from_covariances(weights / weights.sum(), means, covariances)


def one_gaussian() -> GaussianMixture:
    covariance = torch.tensor([[[1.0, 0.6], [0.6, 0.5]]], dtype=torch.float64)
    return GaussianMixture.from_covariances(torch.ones(1, dtype=torch.float64), torch.zeros(1, 2).double(), covariance)


DATA = {
    "ring of 8": ring,
    "5x5 grid": grid,
    "mixture in 16-D": lambda: random_mixture(16),
    "mixture in 64-D": lambda: random_mixture(64),
    "one Gaussian": one_gaussian,
}


class Problem:
    """Data normalised to mean 0 and mean variance 1, and the forward process of T steps."""

    def __init__(self, name: str, steps: int) -> None:
        self.mixture = DATA[name]()
        self.mean = self.mixture.mean()
        self.scale = float((self.mixture.covariance().trace() / self.mixture.dimensions).sqrt())
        self.steps = steps
        # The cosine schedule (arXiv 2102.09672), ending at alphabar = 1e-5.
        times = (torch.arange(steps, dtype=torch.float64) + 1) / steps
        self.process = DiffusionProcess((((times + 0.008) / 1.008 * math.pi / 2).cos() ** 2).clamp_min(1e-5).float())
        self.normalised = GaussianMixture(
            self.mixture.weights,
            (self.mixture.means - self.mean) / self.scale,
            self.mixture.variances / self.scale**2,
            self.mixture.bases,
        )
        # Samplers clip x_0 to the range of the data, as diffusers' schedulers do with clip_sample.
        self.limit = 1.02 * float(self.sample(20_000, torch.Generator().manual_seed(1)).abs().max())

    @property
    def dimensions(self) -> int:
        return self.mixture.dimensions

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return self.normalised.sample(count, generator).float()

    def times(self, t: torch.Tensor) -> torch.Tensor:
        return t.float() / max(self.steps - 1, 1)

    def draw(self, model: PointDenoiser, x_t: torch.Tensor, t: int, draws: int, generator: torch.Generator) -> torch.Tensor:
        """Draw x_0 for x_t: (E, N, D) -> (E, N * draws, D)."""
        time = self.times(torch.full(x_t.shape[:2], t))
        return model.draw(x_t, time, draws, generator).clamp(-self.limit, self.limit)

    def step(self, x_t: torch.Tensor, x0: torch.Tensor, t: int, generator: torch.Generator) -> torch.Tensor:
        """Draw from q(x_s | x_t, x_0) with s = t - 1; returns x_0 itself at the last step, t = 0."""
        if t == 0:
            return x0
        rows = x_t.flatten(0, -2)
        steps = torch.full((len(rows),), t)
        mean, variance = self.process.posterior(rows, x0.flatten(0, -2), steps, steps - 1)
        return (mean + variance.sqrt() * torch.randn(mean.shape, generator=generator)).view(x_t.shape)
