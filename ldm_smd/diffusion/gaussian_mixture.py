"""Gaussian mixtures under the forward process: closed forms of everything that a diffusion model learns.

Data x_0 ~ sum_k w_k N(m_k, S_k). With S_k = U_k diag(lam_k) U_k^T, everything is diagonal in the bases U_k, at all noise
levels. The dtype is that of the mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class GaussianMixture:
    """sum_k w_k N(m_k, U_k diag(lam_k) U_k^T) in D dimensions, or a batch of N with different weights and means.

    Attributes:
        weights: w (K,) or (N, K), positive, with sum 1.
        means: m (K, D) or (N, K, D).
        variances: lam (K, D), the eigenvalues of the covariances.
        bases: U (K, D, D), with the eigenvectors in columns.
    """

    weights: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor
    bases: torch.Tensor

    @classmethod
    def from_covariances(cls, weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor) -> GaussianMixture:
        """Make a mixture from full covariances (K, D, D).

        Raises ValueError for weights that do not sum to 1, or covariances that are not positive semidefinite.
        """
        if weights.min() <= 0 or abs(float(weights.sum()) - 1.0) > 1e-6:
            raise ValueError(f"weights: expected positive numbers that sum to 1, found {weights.tolist()}")
        variances, bases = torch.linalg.eigh(covariances)
        if variances.min() < -1e-9 * variances.max().clamp_min(1.0):
            raise ValueError(f"covariances: expected none with a negative eigenvalue, found {float(variances.min()):g}")
        return cls(weights, means, variances.clamp_min(0.0), bases)

    @classmethod
    def isotropic(cls, means: torch.Tensor, sd: float, weights: torch.Tensor | None = None) -> GaussianMixture:
        """Make a mixture of components N(m_k, sd^2 I), with equal weights by default."""
        components, dimensions = means.shape
        if weights is None:
            weights = means.new_full((components,), 1.0 / components)
        eye = torch.eye(dimensions, dtype=means.dtype, device=means.device).expand(components, -1, -1)
        return cls(weights, means, torch.full_like(means, sd**2), eye)

    @property
    def dimensions(self) -> int:
        return self.means.shape[-1]

    def mean(self) -> torch.Tensor:
        """Return the mean, (D,) or (N, D)."""
        return torch.einsum("...k,...kd->...d", self.weights, self.means)

    def covariance(self) -> torch.Tensor:
        """Return the covariance of an unbatched mixture, (D, D): sum_k w_k (S_k + m_k m_k^T) - m m^T."""
        inner = torch.einsum("k,kde,ke,kfe->df", self.weights, self.bases, self.variances, self.bases)
        centred = self.means - self.mean()
        return inner + torch.einsum("k,kd,ke->de", self.weights, centred, centred)

    def total_variance(self) -> torch.Tensor:
        """Return the trace of the covariance, () or (N,)."""
        between = (self.means - self.mean()[..., None, :]).square().sum(dim=-1)
        return self.weights @ self.variances.sum(dim=1) + (self.weights * between).sum(dim=-1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw samples, (count, D) or (N, count, D)."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        shape = (*which.shape, self.dimensions)
        noise = torch.randn(shape, generator=generator, dtype=self.means.dtype, device=self.means.device)
        means = self.means.gather(-2, which[..., None].expand(shape))
        return means + torch.einsum("...de,...e->...d", self.bases[which], self.variances[which].sqrt() * noise)

    def diffused(self, a: float | torch.Tensor, s: float | torch.Tensor) -> GaussianMixture:
        """Return the marginal of x_t = a x_0 + s eps: sum_k w_k N(a m_k, a^2 S_k + s^2 I)."""
        return GaussianMixture(self.weights, a * self.means, a**2 * self.variances + s**2, self.bases)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Return log p(x), (N,), for x (N, D). Needs positive variances."""
        return self._joint(x).logsumexp(dim=1)

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """Return r_k(x) = w_k N(x; m_k, S_k) / p(x), (N, K), for x (N, D)."""
        return self._joint(x).softmax(dim=1)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """Return grad log p(x) = sum_k r_k(x) S_k^-1 (m_k - x), with the responsibilities r_k; (N, D) -> (N, D)."""
        return -torch.einsum("nk,kde,nke->nd", self.responsibilities(x), self.bases, self._rotated(x) / self.variances)

    def posterior(self, x: torch.Tensor, a: float | torch.Tensor, s: float | torch.Tensor) -> GaussianMixture:
        """Return p(x_0 | x) for x = a x_0 + s eps, x (N, D), with this mixture as the prior of x_0.

            weights r_k(x) ~ w_k N(x; a m_k, a^2 S_k + s^2 I)
            means   m_k + a S_k (a^2 S_k + s^2 I)^-1 (x - a m_k)
            covariances   s^2 S_k (a^2 S_k + s^2 I)^-1

        For q(x_s | x_t), the prior is this mixture ``diffused`` to s: see ``reverse``.
        """
        marginal = self.diffused(a, s)
        gain = a * self.variances / marginal.variances
        means = self.means + torch.einsum("kde,nke->nkd", self.bases, gain * marginal._rotated(x))
        return GaussianMixture(marginal.responsibilities(x), means, s**2 * self.variances / marginal.variances, self.bases)

    def reverse(
        self, x_t: torch.Tensor, a_t: torch.Tensor, s_t: torch.Tensor, a_s: torch.Tensor, s_s: torch.Tensor
    ) -> GaussianMixture:
        """Return the exact q(x_s | x_t) for data from this mixture: x_t = a_ts x_s + sqrt(beta_ts) eps for diffused x_s."""
        a_ts = a_t / a_s
        return self.diffused(a_s, s_s).posterior(x_t, a_ts, (s_t**2 - a_ts**2 * s_s**2).clamp_min(0.0).sqrt())

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """U_k^T (x - m_k), (N, K, D)."""
        return torch.einsum("kde,nkd->nke", self.bases, x[:, None] - self.means)

    def _joint(self, x: torch.Tensor) -> torch.Tensor:
        """log w_k + log N(x; m_k, S_k), (N, K)."""
        squares = self._rotated(x).square() / self.variances
        constants = self.weights.log() - 0.5 * (self.variances.log().sum(dim=1) + self.dimensions * math.log(2 * math.pi))
        return constants - 0.5 * squares.sum(dim=2)


def shared_responsibilities(
    log_weights: torch.Tensor, means: torch.Tensor, linear: torch.Tensor, quadratic: torch.Tensor
) -> torch.Tensor:
    """Return r_k ~ w_k exp(linear . m_k - quadratic . m_k^2 / 2), the responsibilities of components with a shared covariance,
    in coordinates where it is diagonal.

    log_weights (N, K), means (K, D), linear (N, D), quadratic (N, D) or (D,) -> (N, K). For u = a c + s eps with
    c ~ N(m_k, diag(v)), linear is a u / (a^2 v + s^2) and quadratic a^2 / (a^2 v + s^2).
    """
    return (log_weights + (linear @ means.T - 0.5 * quadratic @ means.square().T)).softmax(dim=1)


def choose(responsibilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Choose a component for every row of responsibilities (N, K), from uniform numbers (N, 1): (N,)."""
    return torch.searchsorted(responsibilities.cumsum(dim=1), uniform).clamp_max(responsibilities.shape[1] - 1).squeeze(1)
