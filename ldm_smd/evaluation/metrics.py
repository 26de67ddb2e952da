"""Distances between sets of pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (N, D), in float64:

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric, so no
    matrix root that may fail to converge (scipy's sqrtm) is needed.
    """
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp_min(0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float(means + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def kernel_distance(a: torch.Tensor, b: torch.Tensor, block: int = 2048) -> float:
    """KID (arXiv 1801.01401): the unbiased squared MMD with the kernel k(x, y) = (x . y / D + 1)^3, in float64:

        mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

    Unbiased at any sample size, so it may be below 0 where the sets agree. Kernels are summed block by block.
    """
    a, b = a.double(), b.double()
    within = sum((kernel_sum(x, x, block) - kernel(x, x).sum()) / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(within - 2 * kernel_sum(a, b, block) / (len(a) * len(b)))


def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(x_i . y_i / D + 1)^3 of the rows, (N,)."""
    return ((x * y).mean(dim=1) + 1.0) ** 3


def kernel_sum(a: torch.Tensor, b: torch.Tensor, block: int) -> torch.Tensor:
    """The sum of the kernel over all pairs of rows."""
    return sum(((rows @ b.T / a.shape[1] + 1.0) ** 3).sum() for rows in a.split(block))


def bootstrap_deviation(
    distance: Callable[[torch.Tensor, torch.Tensor], float], a: torch.Tensor, b: torch.Tensor, rounds: int = 50, seed: int = 0
) -> float:
    """Standard deviation of ``distance(a, b)`` when the rows of ``a`` are drawn anew with replacement. 1.96 times it, on
    either side, is the 95 % interval. (Percentiles of the resampled values would be off: a set with repeated rows is
    farther from ``b`` than ``a`` is.)"""
    generator = torch.Generator().manual_seed(seed)
    values = [distance(a[torch.randint(len(a), (len(a),), generator=generator)], b) for _ in range(rounds)]
    return float(torch.tensor(values, dtype=torch.float64).std())
