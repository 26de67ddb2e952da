"""Distances between sets of images in feature space, in float64.

Frechet distances use all images. All other measures compare every image with every other, so they use at most MAX_PAIRED
images of each set, drawn at random. Their N x N matrices are computed in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

BLOCK = 2048
MAX_PAIRED = 50_000
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
"""k as in the papers."""
CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0


class FeatureSet:
    """Features (N, D) of one set of images, with cached statistics for distances to it.

    Attributes:
        features: all rows, in the precision they are given in.
        paired: all rows, or MAX_PAIRED of them drawn at random, float64.
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features
        self._radii: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def paired(self) -> torch.Tensor:
        if len(self) <= MAX_PAIRED:
            return self.features.double()
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:MAX_PAIRED]
        return self.features[drawn.sort().values].double()

    @cached_property
    def mean(self) -> torch.Tensor:
        return self.features.mean(dim=0, dtype=torch.float64)

    @cached_property
    def covariance(self) -> torch.Tensor:
        dimensions = self.features.shape[1]
        total = torch.zeros(dimensions, dimensions, dtype=torch.float64)
        for rows in self.features.split(BLOCK):
            centred = rows.double() - self.mean
            total += centred.T @ centred
        return total / (len(self) - 1)

    @cached_property
    def covariance_root(self) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T

    @cached_property
    def kernel_within(self) -> torch.Tensor:
        """Mean of KID's kernel over pairs of different rows."""
        x = self.paired
        return (kernel_sum(x, x) - ((x * x).mean(dim=1) + 1.0).pow(3).sum()) / (len(x) * (len(x) - 1))

    def radii(self, neighbour: int) -> torch.Tensor:
        """Return the distance from each row of ``paired`` to its k-th nearest neighbour there, k = ``neighbour``."""
        if neighbour not in self._radii:
            k = min(neighbour + 1, len(self.paired))  # the nearest one is the row itself
            parts = [torch.cdist(rows, self.paired).kthvalue(k, dim=1).values for rows in self.paired.split(BLOCK)]
            self._radii[neighbour] = torch.cat(parts)
        return self._radii[neighbour]


Features = torch.Tensor | FeatureSet
"""Features (N, D), or a FeatureSet to reuse its statistics for several distances."""


def feature_set(features: Features) -> FeatureSet:
    return features if isinstance(features, FeatureSet) else FeatureSet(features)


def frechet_distance(a: Features, b: Features) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features:

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    The trace of the root is the sum of the square roots of the eigenvalues of the symmetric matrix C_b^(1/2) C_a C_b^(1/2).
    This avoids a matrix square root that may not converge (scipy's sqrtm).
    """
    a, b = feature_set(a), feature_set(b)
    cross = torch.linalg.eigvalsh(b.covariance_root @ a.covariance @ b.covariance_root).clamp_min(0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def kernel_distance(a: Features, b: Features) -> float:
    """KID (arXiv 1801.01401): the unbiased squared MMD with the kernel k(x, y) = (x . y / D + 1)^3:

        mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

    Over all pairs instead of random subsets. Unbiased at any sample size, so it may be negative for equal distributions.
    """
    a, b = feature_set(a), feature_set(b)
    return float(a.kernel_within + b.kernel_within - 2 * kernel_sum(a.paired, b.paired) / (len(a.paired) * len(b.paired)))


def kernel_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum KID's kernel over all pairs of rows."""
    return torch.stack([((rows @ b.T / a.shape[1] + 1.0) ** 3).sum() for rows in a.split(BLOCK)]).sum()


def cmmd(a: Features, b: Features) -> float:
    """CMMD (arXiv 2401.09603) of CLIP image embeddings of unit length: 1000 times the squared MMD with a Gaussian kernel of
    bandwidth 10. Includes pairs of a row with itself, as in the paper's code."""
    a, b = feature_set(a).paired, feature_set(b).paired

    def mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sums = [(-torch.cdist(rows, y).square() / (2 * CMMD_BANDWIDTH**2)).exp().sum() for rows in x.split(BLOCK)]
        return torch.stack(sums).sum() / (len(x) * len(y))

    return float(CMMD_SCALE * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))


def fidelity_and_diversity(samples: Features, reference: Features) -> dict[str, float]:
    """Return precision, recall, density and coverage.

    Every row has a ball that reaches to the k-th nearest neighbour in its own set. Precision is the fraction of samples in a
    ball of the reference, recall the fraction of the reference in a ball of the samples (arXiv 1904.06991, k = 3). Density is
    the mean number of reference balls that contain a sample, divided by k; coverage is the fraction of reference balls that
    contain a sample (arXiv 2002.09797, k = 5).
    """
    samples, reference = feature_set(samples), feature_set(reference)
    near, wide = reference.radii(PRECISION_NEIGHBOURS), reference.radii(DENSITY_NEIGHBOURS)
    precise = ball_count = torch.zeros((), dtype=torch.float64)
    recalled, nearest = torch.zeros(len(near), dtype=torch.bool), torch.full((len(near),), torch.inf).double()
    for rows, radii in zip(samples.paired.split(BLOCK), samples.radii(PRECISION_NEIGHBOURS).split(BLOCK)):
        distances = torch.cdist(rows, reference.paired)
        precise = precise + (distances <= near).any(dim=1).sum()
        ball_count = ball_count + (distances < wide).sum()
        recalled |= (distances <= radii[:, None]).any(dim=0)
        nearest = torch.minimum(nearest, distances.min(dim=0).values)
    return {
        "precision": float(precise / len(samples.paired)),
        "recall": float(recalled.double().mean()),
        "density": float(ball_count / (DENSITY_NEIGHBOURS * len(samples.paired))),
        "coverage": float((nearest < wide).double().mean()),
    }


def distances(samples: torch.Tensor, reference: Features, unit_length: bool = False, rounds: int = 20) -> dict[str, float]:
    """Return frechet, kid, their bootstrap standard deviations (``_sd``), precision, recall, density and coverage; also cmmd if
    the features are embeddings of unit length."""
    reference = feature_set(reference)
    found = {
        "frechet": frechet_distance(samples, reference),
        "frechet_sd": bootstrap_deviation(frechet_distance, samples, reference, rounds),
        "kid": kernel_distance(samples, reference),
        "kid_sd": kernel_deviation(samples, reference, rounds),
        **fidelity_and_diversity(samples, reference),
    }
    return found | ({"cmmd": cmmd(samples, reference)} if unit_length else {})


def bootstrap_deviation(
    distance: Callable[[Features, Features], float], a: torch.Tensor, b: Features, rounds: int = 50, seed: int = 0
) -> float:
    """Return the bootstrap standard deviation of ``distance(a, b)``, resampling the rows of ``a``. The 95 % interval is 1.96
    times that on either side. Percentiles of the resampled values would be biased, because a set with repeated rows has a
    larger distance from ``b``."""
    b = feature_set(b)
    values = [distance(a[chosen], b) for chosen in bootstrap_indices(len(a), rounds, seed)]
    return float(torch.tensor(values, dtype=torch.float64).std())


def bootstrap_indices(count: int, rounds: int, seed: int) -> list[torch.Tensor]:
    """Draw ``count`` rows with replacement, for each round of a bootstrap."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(count, (count,), generator=generator) for _ in range(rounds)]


def kernel_deviation(a: Features, b: Features, rounds: int = 50, seed: int = 0) -> float:
    """Return ``bootstrap_deviation(kernel_distance, a, b, rounds, seed)``, with each kernel value computed once for all rounds.
    If row i of ``a`` was drawn n_i times,

        sum_ij n_i n_j k(a_i, a_j) - sum_i n_i k(a_i, a_i)   and   sum_ij n_i k(a_i, b_j)

    are the sums over pairs of drawn rows.
    """
    a, b = feature_set(a), feature_set(b)
    x, y, dimensions = a.paired, b.paired, a.features.shape[1]
    drawn = bootstrap_indices(len(x), rounds, seed)
    times = torch.stack([chosen.bincount(minlength=len(x)) for chosen in drawn], dim=1).double()
    within = -(((x * x).mean(dim=1) + 1.0).pow(3) @ times)
    across = torch.zeros(rounds, dtype=torch.float64)
    for rows, own in zip(x.split(BLOCK), times.split(BLOCK)):
        within += (own * ((rows @ x.T / dimensions + 1.0) ** 3 @ times)).sum(dim=0)
        across += ((rows @ y.T / dimensions + 1.0) ** 3).sum(dim=1) @ own
    values = within / (len(x) * (len(x) - 1)) + b.kernel_within - 2 * across / (len(x) * len(y))
    return float(values.std())
