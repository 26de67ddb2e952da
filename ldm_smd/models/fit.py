"""Fits Gaussian mixtures to points and latents. The only module that needs scikit-learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from ..diffusion.process import GaussianPath, prediction_coefficients
from .noise import SMALLEST, PosteriorNoise

FLOOR = 0.05
"""Added to the variances within the modes, as a fraction of the mean variance of the principal components used."""


@torch.no_grad()
def fit_posterior_noise(
    noise: PosteriorNoise, latents: torch.Tensor, labels: torch.Tensor, path: GaussianPath, prediction_type: str
) -> None:
    """Fit the principal components and the mixture to data, and tabulate the noise schedule of a path.

    Args:
        latents: (N, C, H, W), normalised as in training, N at least the number of modes.
        labels: (N,), or (N, L) if latents belong to several classes; -1 for none.
        path: its timesteps 0 to ``last`` are those of ``noise``.
        prediction_type: that of the network.
    """
    if len(latents) < len(noise.means):
        raise ValueError(f"latents: expected at least one for each of {len(noise.means)} modes, found {len(latents)}")
    if len(noise.norms) != path.last + 1:
        raise ValueError(f"timesteps: expected {path.last + 1}, 0 to the last of the path, found {len(noise.norms)}")
    pooled = noise.on_grid(latents).double()
    centre = pooled.mean(dim=0)
    pooled = pooled - centre
    basis, variances, _ = leading(pooled.T @ pooled / len(pooled), noise.rank)
    floor = FLOOR * float(variances.mean()) + SMALLEST
    weights, means, covariance, responsibilities = fit_shared(pooled @ basis.T, len(noise.means), floor)
    by_class = weights_by_class(weights, responsibilities, labels, len(noise.log_weights) - 1)
    # Rotate the basis to the principal axes of the modes' covariance.
    variances, axes = torch.linalg.eigh(covariance)
    noise.log_weights.copy_(by_class.clamp_min(SMALLEST**2).log())
    noise.basis.copy_(axes.T @ basis)
    noise.centre.copy_(centre)
    noise.means.copy_(means @ axes)
    noise.variances.copy_(variances)
    t = torch.arange(path.last + 1)
    a, s = (value.double() for value in path.to(t.device).signal_and_noise(t, t))
    alpha, beta = prediction_coefficients(prediction_type, a, s)
    norms = torch.hypot(a, s)
    noise.norms.copy_(norms)
    noise.alphas_cumprod.copy_((a / norms) ** 2)
    noise.scale.copy_((s * alpha - a * beta) / norms)


def leading(covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return eigenvectors (rank, D) and eigenvalues (rank,) of a covariance (D, D), largest first, and the mean of the rest."""
    variances, vectors = torch.linalg.eigh(covariance)
    variances = variances.clamp_min(0.0)
    return vectors[:, -rank:].flip(1).T, variances[-rank:].flip(0), variances[:-rank].mean()


def fit_shared(
    points: torch.Tensor, modes: int, floor: float, iterations: int = 10, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit sum_k w_k N(m_k, S), with one shared covariance, by EM from a k-means start.

    The shared S makes the responsibilities log-linear in x, so an iteration takes one matrix product:

        log r_k(x) = log w_k + x^T S^-1 m_k - m_k^T S^-1 m_k / 2 + const

    scikit-learn's "tied" mixture multiplies by S^-1/2 once per mode, which is 30 times slower for 256 modes in 128 dimensions.

    Args:
        points: (N, D), N >= modes.
        floor: number added to the diagonal of S.

    Returns:
        weights (K,), means (K, D), covariance (D, D), responsibilities (N, K).
    """
    labels = KMeans(modes, n_init=1, random_state=seed).fit(points.cpu().numpy()).labels_
    responsibilities = F.one_hot(torch.as_tensor(labels, device=points.device).long(), modes).to(points.dtype)
    second = points.T @ points / len(points)
    for _ in range(iterations):
        counts = responsibilities.sum(dim=0).clamp_min(torch.finfo(points.dtype).tiny)
        weights, means = counts / len(points), responsibilities.T @ points / counts[:, None]
        covariance = second - (weights[:, None] * means).T @ means
        covariance.diagonal().add_(floor)
        directions = torch.linalg.solve(covariance, means.T)  # (D, K)
        responsibilities = (weights.log() + points @ directions - 0.5 * (means.T * directions).sum(dim=0)).softmax(dim=1)
    return weights, means, covariance, responsibilities


def weights_by_class(weights: torch.Tensor, responsibilities: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the weights of the components per class and, in the last row, for no class: (classes + 1, K).

    They are the mean responsibilities (N, K) of the points of a class, smoothed with one pseudo-count of the overall weights.
    """
    rows, labels = weights.repeat(classes + 1, 1), labels.view(len(labels), -1)
    for label in range(classes):
        rows[label] += responsibilities[(labels == label).any(dim=1)].sum(dim=0)
    return rows / rows.sum(dim=1, keepdim=True)
