"""Gaussian mixtures under the forward process: everything a diffusion model learns, in closed form.

Data x_0 ~ sum_k w_k N(m_k, S_k). With S_k = U_k diag(lam_k) U_k^T all of it is diagonal in the bases U_k, and holds for every
noise level at once. Float64 throughout, unless the mixture is made from another dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture as Estimator


@dataclass
class GaussianMixture:
    """sum_k w_k N(m_k, U_k diag(lam_k) U_k^T) in D dimensions.

    Attributes:
        weights: w (K,), positive, sum 1.
        means: m (K, D).
        variances: lam (K, D), the eigenvalues of the covariances.
        bases: U (K, D, D), the eigenvectors in columns.
    """

    weights: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor
    bases: torch.Tensor

    @classmethod
    def from_covariances(cls, weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor) -> GaussianMixture:
        """From full covariances (K, D, D). Raises ValueError for weights that do not sum to 1, or covariances that are not
        positive semidefinite."""
        if weights.min() <= 0 or abs(float(weights.sum()) - 1.0) > 1e-6:
            raise ValueError(f"weights: expected positive numbers that sum to 1, found {weights.tolist()}")
        variances, bases = torch.linalg.eigh(covariances)
        if variances.min() < -1e-9 * variances.max().clamp_min(1.0):
            raise ValueError(f"covariances: expected none with a negative eigenvalue, found {float(variances.min()):g}")
        return cls(weights, means, variances.clamp_min(0.0), bases)

    @classmethod
    def isotropic(cls, means: torch.Tensor, sd: float, weights: torch.Tensor | None = None) -> GaussianMixture:
        """Components N(m_k, sd^2 I), of equal weight where none is given."""
        components, dimensions = means.shape
        if weights is None:
            weights = means.new_full((components,), 1.0 / components)
        eye = torch.eye(dimensions, dtype=means.dtype, device=means.device).expand(components, -1, -1)
        return cls(weights, means, torch.full_like(means, sd**2), eye)

    @classmethod
    def fit(cls, points: torch.Tensor, components: int, floor: float = 1e-6, seed: int = 0) -> GaussianMixture:
        """Maximum likelihood by EM (scikit-learn: k-means++ start, full covariances).

        Args:
            points: (N, D), N >= components.
            floor: added to the variances, so that no component shrinks to a point.
        """
        if len(points) < components:
            raise ValueError(f"points: expected at least as many as components, {components}, found {len(points)}")
        estimator = Estimator(components, reg_covar=floor, init_params="k-means++", max_iter=500, n_init=3, random_state=seed)
        estimator.fit(points.double().cpu().numpy())
        parts = (estimator.weights_, estimator.means_, estimator.covariances_)
        return cls.from_covariances(*(torch.as_tensor(part, device=points.device) for part in parts))

    @property
    def dimensions(self) -> int:
        return self.means.shape[1]

    def mean(self) -> torch.Tensor:
        """(D,)"""
        return self.weights @ self.means

    def covariance(self) -> torch.Tensor:
        """Covariance of the whole mixture, (D, D): sum_k w_k (S_k + m_k m_k^T) - m m^T."""
        inner = torch.einsum("k,kde,ke,kfe->df", self.weights, self.bases, self.variances, self.bases)
        centred = self.means - self.mean()
        return inner + torch.einsum("k,kd,ke->de", self.weights, centred, centred)

    def sample(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """(count, D)"""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn((count, self.dimensions), generator=generator, dtype=self.means.dtype, device=self.means.device)
        return self.means[which] + torch.einsum("nde,ne->nd", self.bases[which], self.variances[which].sqrt() * noise)

    def diffused(self, a: float | torch.Tensor, s: float | torch.Tensor) -> GaussianMixture:
        """The marginal of x_t = a x_0 + s eps: sum_k w_k N(a m_k, a^2 S_k + s^2 I)."""
        return GaussianMixture(self.weights, a * self.means, a**2 * self.variances + s**2, self.bases)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, D) -> (N,)"""
        return self._joint(x).logsumexp(dim=1)

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """r_k(x) = w_k N(x; m_k, S_k) / p(x), x (N, D) -> (N, K)"""
        return self._joint(x).softmax(dim=1)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """grad log p(x) = sum_k r_k(x) S_k^-1 (m_k - x), with the responsibilities r_k; (N, D) -> (N, D)."""
        shares = self.responsibilities(x)
        return -torch.einsum("nk,kde,nke->nd", shares, self.bases, self._rotated(x) / self.variances)

    def posterior(self, x: torch.Tensor, a: float | torch.Tensor, s: float | torch.Tensor) -> ConditionalMixture:
        """p(x_0 | x) for x = a x_0 + s eps with this mixture as the prior of x_0; x (N, D).

            shares  r_k(x) ~ w_k N(x; a m_k, a^2 S_k + s^2 I)
            means   m_k + a S_k (a^2 S_k + s^2 I)^-1 (x - a m_k)
            covariances   s^2 S_k (a^2 S_k + s^2 I)^-1

        q(x_s | x_t) of a longer step is the same with ``diffused`` to s as the prior: see ``reverse``.
        """
        marginal = self.diffused(a, s)
        gain = a * self.variances / marginal.variances
        means = self.means + torch.einsum("kde,nke->nkd", self.bases, gain * marginal._rotated(x))
        return ConditionalMixture(marginal.responsibilities(x), means, s**2 * self.variances / marginal.variances, self.bases)

    def reverse(
        self, x_t: torch.Tensor, a_t: torch.Tensor, s_t: torch.Tensor, a_s: torch.Tensor, s_s: torch.Tensor
    ) -> ConditionalMixture:
        """q(x_s | x_t), exactly, for data from this mixture: x_t = a_ts x_s + sqrt(beta_ts) eps, and x_s is diffused data."""
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


def leading(covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return eigenvectors (rank, D) and eigenvalues (rank,) of a covariance (D, D), largest first, and the mean of the rest."""
    variances, vectors = torch.linalg.eigh(covariance)
    variances = variances.clamp_min(0.0)
    return vectors[:, -rank:].flip(1).T, variances[-rank:].flip(0), variances[:-rank].mean()


def fit_shared(
    points: torch.Tensor, modes: int, floor: float, iterations: int = 10, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """EM for sum_k w_k N(m_k, S), the modes sharing one covariance, from k-means.

    With S the same the responsibilities are log-linear in x, one matrix product an iteration:

        log r_k(x) = log w_k + x^T S^-1 m_k - m_k^T S^-1 m_k / 2 + const

    scikit-learn's "tied" mixture multiplies by S^-1/2 once for every mode, 30 times slower for 256 modes in 128 dimensions.

    Args:
        points: (N, D), N >= modes.
        floor: added to the diagonal of S.

    Returns:
        weights (K,), means (K, D), covariance (D, D), responsibilities (N, K).
    """
    labels = KMeans(modes, n_init=1, random_state=seed).fit(points.cpu().numpy()).labels_
    shares = F.one_hot(torch.as_tensor(labels, device=points.device).long(), modes).to(points.dtype)
    second = points.T @ points / len(points)
    for _ in range(iterations):
        counts = shares.sum(dim=0).clamp_min(torch.finfo(points.dtype).tiny)
        weights, means = counts / len(points), shares.T @ points / counts[:, None]
        covariance = second - (weights[:, None] * means).T @ means
        covariance.diagonal().add_(floor)
        directions = torch.linalg.solve(covariance, means.T)  # (D, K)
        shares = (weights.log() + points @ directions - 0.5 * (means.T * directions).sum(dim=0)).softmax(dim=1)
    return weights, means, covariance, shares


def shared_responsibilities(
    log_weights: torch.Tensor, means: torch.Tensor, linear: torch.Tensor, quadratic: torch.Tensor
) -> torch.Tensor:
    """r_k ~ w_k exp(linear . m_k - quadratic . m_k^2 / 2), the posterior of the components where they share a covariance, in
    coordinates in which it is diagonal: log_weights (N, K), means (K, D), linear (N, D), quadratic (N, D) or (D,) -> (N, K).

    For u = a c + s eps with c ~ N(m_k, diag(v)), linear is a u / (a^2 v + s^2) and quadratic a^2 / (a^2 v + s^2).
    """
    return (log_weights + (linear @ means.T - 0.5 * quadratic @ means.square().T)).softmax(dim=1)


def choose(shares: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A component for every row of shares (N, K), by a uniform number each, (N, 1) -> (N,)."""
    return torch.searchsorted(shares.cumsum(dim=1), uniform).clamp_max(shares.shape[1] - 1).squeeze(1)


def weights_by_class(weights: torch.Tensor, shares: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the weights of the components (K,) for every class and, in the last row, for no class: (classes + 1, K).

    The mean responsibilities (N, K) of a class's points, with one point's worth of the weights of all.
    """
    rows = weights.repeat(classes + 1, 1)
    for label in range(classes):
        rows[label] += shares[labels == label].sum(dim=0)
    return rows / rows.sum(dim=1, keepdim=True)


@dataclass
class ConditionalMixture:
    """One Gaussian mixture for each of N rows; only the weights and means differ between the rows.

    Attributes:
        weights: (N, K), rows sum to 1.
        means: (N, K, D).
        variances: (K, D), eigenvalues.
        bases: (K, D, D), eigenvectors in columns.
    """

    weights: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor
    bases: torch.Tensor

    def mean(self) -> torch.Tensor:
        """(N, D)"""
        return torch.einsum("nk,nkd->nd", self.weights, self.means)

    def total_variance(self) -> torch.Tensor:
        """The trace of each row's covariance, (N,)."""
        within = self.weights @ self.variances.sum(dim=1)
        between = (self.means - self.mean()[:, None]).square().sum(dim=2)
        return within + (self.weights * between).sum(dim=1)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, D), a point for each row -> (N,). Needs positive variances."""
        rotated = torch.einsum("kde,nkd->nke", self.bases, x[:, None] - self.means)
        constants = self.weights.log() - 0.5 * (self.variances.log() + math.log(2 * math.pi)).sum(dim=1)
        return (constants - 0.5 * (rotated.square() / self.variances).sum(dim=2)).logsumexp(dim=1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """(N, count, D)"""
        rows, _, dimensions = self.means.shape
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn((rows, count, dimensions), generator=generator, dtype=self.means.dtype, device=self.means.device)
        means = self.means.gather(1, which[..., None].expand(-1, -1, dimensions))
        return means + torch.einsum("nmde,nme->nmd", self.bases[which], self.variances[which].sqrt() * noise)
