"""Distances between sets of pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class PixelPCA:
    """The first principal components of pixel values, fitted on reference pictures: features that need no network.

    They see layout, colour and coarse shape, and nothing finer; a distance in them is for comparing models of one data
    set with each other, and is not an FID.
    """

    mean: torch.Tensor
    components: torch.Tensor

    @classmethod
    def fit(cls, pixels: torch.Tensor, components: int = 64) -> PixelPCA:
        """``pixels`` uint8 (N, 3, H, W), or floats in [0, 1]; N > components."""
        x = as_vectors(pixels)
        mean = x.mean(dim=0)
        _, _, directions = torch.svd_lowrank(x - mean, q=components + 16, niter=8)
        return cls(mean, directions[:, :components])

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> float64 features (N, components)."""
        return (as_vectors(pixels) - self.mean) @ self.components


def as_vectors(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures as float64 rows with values in [0, 1]."""
    x = pixels.flatten(1).double()
    return x / 255.0 if pixels.dtype == torch.uint8 else x


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
