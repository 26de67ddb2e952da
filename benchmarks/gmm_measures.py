"""Distances of samples from the data, and of one-step kernels from the exact ones, which are known for Gaussian mixtures."""

from __future__ import annotations

import statistics
from functools import cache

import torch
from gmm_data import DATA, Problem
from gmm_models import PointDenoiser, repeat
from scipy.stats import chi2

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture

IN_MODE = chi2.cdf(16.0, 2)  # probability of 4 standard deviations in two dimensions; the radius grows with the dimension
PAIRS, SETS = 24, 6
"""Numbers of distances that are averaged: pairs of data samples for the floor, sets of samples for every model."""
KERNEL_POINTS, KERNEL_DRAWS, KERNEL_STEPS = 48, 256, 5


@torch.no_grad()
def sample(problem: Problem, network: PointDenoiser, count: int, generator: torch.Generator) -> torch.Tensor:
    """Sample with all T steps, one draw per step: (E, count, D) in the units of the data."""
    x = torch.randn(network.models, count, problem.dimensions, generator=generator)
    for t in reversed(range(problem.steps)):
        x = problem.step(x, problem.draw(network, x, t, 1, generator), t, generator)
    return x.double() * problem.scale + problem.mean


@torch.no_grad()
def kernel(problem: Problem, network: PointDenoiser) -> tuple[list[float], list[float]]:
    """Compare the learned step with the exact one, averaged over timesteps and points x_t.

    Returns:
        For each model, the energy distance between the learned p(x_s | x_t) and the exact q(x_s | x_t), and the spread of x_0
        over eta divided by that of the exact posterior.
    """
    generator = torch.Generator().manual_seed(2)
    count = min(KERNEL_STEPS, problem.steps)
    chosen = sorted({round(i * (problem.steps - 1) / max(count - 1, 1)) for i in range(count)})
    distances, spreads = [], []
    for t in chosen:
        x_t = problem.process.noise(
            problem.sample(KERNEL_POINTS, generator),
            torch.randn(KERNEL_POINTS, problem.dimensions, generator=generator),
            torch.full((KERNEL_POINTS,), t),
        )
        many = x_t.expand(network.models, -1, -1)
        x0 = problem.draw(network, many, t, KERNEL_DRAWS, generator)
        learned = problem.step(repeat(many, KERNEL_DRAWS), x0, t, generator)
        # The last step, t = 0, ends at x_0 without noise.
        levels = problem.process.signal_and_noise(torch.tensor([t, t - 1]), torch.zeros(2))
        (a_t, a_s), (s_t, s_s) = (level.double() for level in levels)
        exact = problem.normalised.reverse(x_t.double(), a_t, s_t, a_s, s_s).sample(KERNEL_DRAWS, generator).float()
        learned = learned.unflatten(1, (KERNEL_POINTS, KERNEL_DRAWS))
        distances.append([float(energy_distance(rows, exact).mean()) for rows in learned])
        posterior = problem.normalised.posterior(x_t.double(), a_t, s_t).total_variance().mean()
        variance = x0.unflatten(1, (KERNEL_POINTS, KERNEL_DRAWS)).var(dim=2).sum(dim=-1).mean(dim=1)
        spreads.append((variance / posterior).sqrt().tolist())
    return [statistics.mean(column) for column in zip(*distances)], [statistics.mean(column) for column in zip(*spreads)]


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'| from samples (..., N, D) and (..., N', D)."""
    n, m = a.shape[-2], b.shape[-2]
    within = torch.cdist(a, a).sum((-1, -2)) / (n * (n - 1)) + torch.cdist(b, b).sum((-1, -2)) / (m * (m - 1))
    return 2 * torch.cdist(a, b).mean((-1, -2)) - within


def sliced_w2(a: torch.Tensor, b: torch.Tensor, projections: int = 64) -> float:
    """Return the root mean square, over random directions, of the 2-Wasserstein distance of the projections."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(a.shape[1], projections, generator=generator).double(), dim=0)
    apart = (a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values
    return float(apart.square().mean().sqrt())


def modes(mixture: GaussianMixture, points: torch.Tensor) -> dict[str, float]:
    """Return the fraction of points in modes, the number of modes covered, and the largest relative error of a mode's weight.

    A mode contains the fraction IN_MODE of its own component. It is covered if it has at least a fifth of the points it should
    have. The weight of a mode is its fraction of all points in modes.
    """
    rotated = torch.einsum("kde,nkd->nke", mixture.bases, points[:, None] - mixture.means)
    distance, nearest = (rotated.square() / mixture.variances).sum(dim=2).min(dim=1)
    inside = distance <= chi2.ppf(IN_MODE, mixture.dimensions)
    fractions = torch.bincount(nearest[inside], minlength=len(mixture.weights)) / max(int(inside.sum()), 1)
    relative = fractions / mixture.weights
    return {
        "in_mode": float(inside.double().mean()),
        "modes_covered": int((relative >= 0.2).sum()),
        "worst_mode": float((relative - 1).abs().max()),
    }


@cache
def floor(name: str, count: int) -> float:
    """Return the mean sliced W2 between two sets of ``count`` samples of the data, the value of an exact sampler. A single pair
    would have an error of a sixth."""
    generator, mixture = torch.Generator().manual_seed(5), DATA[name]()
    return statistics.mean(sliced_w2(mixture.sample(count, generator), mixture.sample(count, generator)) for _ in range(PAIRS))


def measure(name: str, problem: Problem, network: PointDenoiser, seconds: float) -> dict[str, list[float]]:
    """Return every measure, with a value for each seed. Sliced W2 is a mean over SETS sets of samples; the others use the
    first set."""
    generator = torch.Generator().manual_seed(4)
    count = 20_000 if problem.steps <= 10 else 5_000
    if problem.dimensions > 16:
        count = min(count, 10_000)
    sets = [sample(problem, network, count, generator) for _ in range(SETS)]
    rows: dict[str, list[float]] = {}
    for model in range(network.models):
        apart = [sliced_w2(samples[model], problem.mixture.sample(count, generator)) for samples in sets]
        found = {"sliced_w2": statistics.mean(apart)}
        found["sliced_w2_over_floor"] = found["sliced_w2"] / floor(name, count)
        found |= modes(problem.mixture, sets[0][model])
        data = problem.mixture.sample(5000, generator)
        found["energy_distance"] = float(energy_distance(sets[0][model, :5000], data))
        for key, value in found.items():
            rows.setdefault(key, []).append(value)
    rows["kernel_energy_distance"], rows["spread_share"] = kernel(problem, network)
    rows["seconds"] = [seconds / network.models] * network.models
    return rows
