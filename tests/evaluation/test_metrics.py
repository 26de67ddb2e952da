import pytest
import torch

from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.evaluation.diagnostics import has_collapsed, spread_over_eta
from ldm_smd.evaluation.metrics import bootstrap_deviation, frechet_distance, kernel_distance


def test_frechet_distance_of_commuting_gaussians():
    """For diagonal covariances: |m_a - m_b|^2 + sum (sd_a - sd_b)^2, with the sample's own moments."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(500, 5, generator=generator).double()).Q
    basis = torch.linalg.qr(basis - basis.mean(dim=0)).Q * 499**0.5  # exact mean 0, covariance I
    a = basis * torch.tensor([1.0, 2, 3, 4, 5]) + 1.0
    b = basis * torch.tensor([2.0, 2, 1, 4, 9]) - 1.0
    assert frechet_distance(a, b) == pytest.approx(5 * 4 + 1 + 0 + 4 + 0 + 16, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_symmetric_and_survives_singular_covariances():
    a, b = torch.randn(10, 30).double(), torch.randn(12, 30).double() * 2
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_kernel_distance_is_the_unbiased_mmd():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 3, generator=generator).double(), torch.randn(9, 3, generator=generator).double() + 1

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    def within(x):
        return sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))

    across = sum(k(x, y) for x in a for y in b) / 63
    assert kernel_distance(a, b, block=4) == pytest.approx(within(a) + within(b) - 2 * across, rel=1e-12)
    same = [kernel_distance(*torch.randn(2, 200, 3, generator=generator)) for _ in range(30)]
    assert abs(sum(same) / 30) < 0.05


def test_bootstrap_deviation_is_the_deviation_over_samples():
    generator = torch.Generator().manual_seed(0)

    def mean_gap(a, b):
        return float(a.mean() - b.mean())

    found = bootstrap_deviation(mean_gap, torch.randn(400, 1, generator=generator), torch.zeros(10, 1), rounds=300)
    assert found == pytest.approx(1 / 20, rel=0.2)


class KnownMixture(torch.nn.Module):
    """Predicts x_0 = scale * eta."""

    is_mixture = True

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, t, labels, eta):
        return type("Output", (), {"sample": self.scale * eta})


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_spread_is_the_deviation_over_eta_and_its_share_of_the_posteriors(scale):
    """The latents are N(0, 1) and x_t says nothing at the last step: the posterior has deviation 1."""
    process = DiffusionProcess(torch.linspace(0.99, 0.0, 10))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(64, 4, 8, 8, generator=generator)
    spread = spread_over_eta(KnownMixture(scale), process, "sample", latents, None, [9], draws=16)
    assert spread[9].over_eta == pytest.approx(scale, rel=0.05)
    # The mean of 16 draws of deviation ``scale`` is off by scale / 4.
    expected = scale * ((1 + 1 / 16) / (1 + scale**2 / 16)) ** 0.5
    assert spread[9].share == pytest.approx(expected, rel=0.05)
    assert has_collapsed(spread) == (scale == 0.0)
