import math

import pytest
import torch

from ldm_smd.diffusion.process import DiffusionProcess, RectifiedFlow
from ldm_smd.evaluation import distances as metrics
from ldm_smd.evaluation.diagnostics import has_collapsed, spread_over_eta
from ldm_smd.evaluation.distances import (
    FeatureSet,
    bootstrap_deviation,
    cmmd,
    distances,
    fidelity_and_diversity,
    frechet_distance,
    kernel_deviation,
    kernel_distance,
)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 4)


def test_frechet_distance_of_commuting_gaussians():
    """For diagonal covariances it is |m_a - m_b|^2 + sum (sd_a - sd_b)^2, with the moments of the samples."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(500, 5, generator=generator).double()).Q
    basis = torch.linalg.qr(basis - basis.mean(dim=0)).Q * 499**0.5  # exact mean 0, covariance I
    a = basis * torch.tensor([1.0, 2, 3, 4, 5]) + 1.0
    b = basis * torch.tensor([2.0, 2, 1, 4, 9]) - 1.0
    assert frechet_distance(a, b) == pytest.approx(5 * 4 + 1 + 0 + 4 + 0 + 16, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_of_many_images_some_are_compared_in_pairs(monkeypatch):
    """And all enter the Frechet distance."""
    a, b = (torch.randn(60, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = distances(a, b, unit_length=True)
    monkeypatch.setattr(metrics, "MAX_PAIRED", 40)
    chosen = [FeatureSet(features).paired.float() for features in (a, b)]
    assert all(len(rows) == 40 == len({tuple(row) for row in rows.tolist()}) for rows in chosen)
    found, of_chosen = distances(a, b, unit_length=True), distances(*chosen, unit_length=True)
    for name, value in found.items():
        assert value == pytest.approx((expected if name.startswith("frechet") else of_chosen)[name], rel=1e-9), name


def test_frechet_distance_is_symmetric_also_with_singular_covariances():
    a, b = torch.randn(10, 30).double(), torch.randn(12, 30).double() * 2
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_kernel_distance_is_the_unbiased_mmd(small_blocks):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 3, generator=generator).double(), torch.randn(9, 3, generator=generator).double() + 1

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    def within(x):
        return sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))

    across = sum(k(x, y) for x in a for y in b) / 63
    assert kernel_distance(a, b) == pytest.approx(within(a) + within(b) - 2 * across, rel=1e-9)
    same = [kernel_distance(*torch.randn(2, 200, 3, generator=generator)) for _ in range(30)]
    assert abs(sum(same) / 30) < 0.05


def test_distances_equal_those_of_torch_fidelity_for_the_same_features():
    """Up to 1e-6. torch-fidelity uses eigenvalues of the product of covariances, and here one KID subset with all samples."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 16, generator=generator).double().abs()
    b = torch.randn(300, 16, generator=generator).double().abs() * 1.3
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    theirs = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=300, verbose=False)
    assert kernel_distance(a, b) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    theirs = prc_features_to_metric(a, b, verbose=False)
    ours = fidelity_and_diversity(a, b)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_density_and_coverage_follow_their_definition(small_blocks):
    generator = torch.Generator().manual_seed(0)
    samples, reference = torch.randn(23, 3, generator=generator).double(), torch.randn(31, 3, generator=generator).double()
    radii = torch.tensor([sorted(float((x - y).norm()) for y in reference)[5] for x in reference])
    inside = torch.tensor([[float((x - y).norm()) < radius for y in samples] for x, radius in zip(reference, radii)])
    found = fidelity_and_diversity(samples, reference)
    assert found["density"] == pytest.approx(float(inside.sum()) / (5 * 23))
    assert found["coverage"] == pytest.approx(float(inside.any(dim=1).double().mean()))
    same = fidelity_and_diversity(reference, reference)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)


def test_a_sample_at_the_distance_of_the_kth_neighbour_is_inside():
    """The third neighbour of 0 among 0, 1, 2, 3, 10 is at distance 3, like the sample, which is outside all other balls."""
    reference = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0], [10, 0]])
    assert fidelity_and_diversity(torch.tensor([[-3.0, 0]]), reference)["precision"] == 1
    assert fidelity_and_diversity(torch.tensor([[-3.1, 0]]), reference)["precision"] == 0


def test_distances_are_computed_in_float64_and_cmmd_only_for_unit_length():
    a, b = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0)) + 1000.0
    found = distances(a, b, rounds=3)
    assert found["frechet"] == pytest.approx(frechet_distance(a.double(), b.double()), rel=1e-9)
    assert found["frechet_sd"] > 0 and found["kid_sd"] > 0 and "cmmd" not in found
    found = distances(*map(torch.nn.functional.normalize, (a, b)), unit_length=True, rounds=2)
    assert found["cmmd"] >= 0


def test_cmmd_is_the_biased_mmd_times_a_thousand(small_blocks):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(n, 8, generator=generator)).double() for n in (9, 7))

    def mean(x, y):
        return sum(math.exp(-float((p - q).square().sum()) / 200) for p in x for q in y) / (len(x) * len(y))

    assert cmmd(a, b) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)


def test_a_feature_set_can_be_used_again(small_blocks):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 4, generator=generator)
    once = FeatureSet(b)
    for distance in (frechet_distance, kernel_distance, fidelity_and_diversity):
        expected = pytest.approx(distance(a, b), rel=1e-9)
        assert distance(a, once) == distance(a, once) == expected


def test_bootstrap_estimates_the_standard_deviation():
    generator = torch.Generator().manual_seed(0)

    def mean_gap(a, b):
        return float(a.mean() - b.features.mean())

    found = bootstrap_deviation(mean_gap, torch.randn(400, 1, generator=generator), torch.zeros(10, 1), rounds=300)
    assert found == pytest.approx(1 / 20, rel=0.2)


def test_the_deviation_of_the_kernel_distance_is_that_of_its_bootstrap(small_blocks):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, 3, generator=generator), torch.randn(11, 3, generator=generator) + 0.5
    expected = bootstrap_deviation(kernel_distance, a, b, rounds=10, seed=3)
    assert kernel_deviation(a, b, rounds=10, seed=3) == pytest.approx(expected, rel=1e-6)


class KnownMixture(torch.nn.Module):
    """Predicts x_0 = scale * eta."""

    is_mixture = True

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, t, labels, eta):
        return type("Output", (), {"sample": self.scale * eta})


@pytest.mark.parametrize("path", [DiffusionProcess(torch.linspace(0.99, 0.0, 10)), RectifiedFlow(9)])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_spread_is_the_standard_deviation_over_eta_also_relative_to_the_posterior(scale, path):
    """The latents are N(0, 1), and x_t is pure noise at the last timestep, so the posterior has standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(64, 4, 8, 8, generator=generator)
    spread = spread_over_eta(KnownMixture(scale), path, "sample", latents, None, [9], draws=16)
    assert spread[9].over_eta == pytest.approx(scale, rel=0.05)
    # The mean of 16 draws with standard deviation ``scale`` has a standard error of scale / 4.
    expected = scale * ((1 + 1 / 16) / (1 + scale**2 / 16)) ** 0.5
    assert spread[9].ratio == pytest.approx(expected, rel=0.05)
    assert has_collapsed(spread) == (scale == 0.0)


@pytest.mark.parametrize("path, t", [(DiffusionProcess(torch.linspace(0.99, 0.0, 10)), 5), (RectifiedFlow(9), 5)])
@pytest.mark.parametrize("gain", [1.0, 1.5, 0.5])
def test_the_gain_is_that_of_the_mean_draw_over_the_posterior_mean(path, t, gain):
    """The latents are N(0, 1), so E[x_0 | x_t] = a x_t / (a^2 + s^2). The spread of the draws does not count."""
    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    a, s = path.signal_and_noise(torch.tensor([t]), latents)

    class Exaggerating(KnownMixture):
        def forward(self, x, t, labels, eta):
            posterior_mean = (a * x / (a**2 + s**2)).repeat_interleave(len(eta) // len(x), dim=0)
            return type("Output", (), {"sample": gain * posterior_mean + self.scale * eta})

    found = spread_over_eta(Exaggerating(0.7), path, "sample", latents, None, [t])[t]
    assert found.gain == pytest.approx(gain, rel=0.05) and found.over_eta == pytest.approx(0.7, rel=0.05)
