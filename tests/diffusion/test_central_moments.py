"""Moments and kernels, compared with Gaussian mixtures, for which q(x_s | x_t) is known."""

import pytest
import torch

from ldm_smd.diffusion.central_moments import CentralMoments, moments_of, reverse_moments, two_gaussians, x0_moments
from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from tests.diffusion.paths import KINDS, PATHS

MIXTURE = GaussianMixture.isotropic(torch.tensor([[-1.2], [0.3], [1.0]]).double(), 0.1, torch.tensor([0.5, 0.2, 0.3]).double())
GRID = torch.linspace(-7, 7, 400_001, dtype=torch.float64)


def quadrature(log_density):
    """Return the moments of a density on GRID."""
    weights = torch.softmax(log_density, 0)
    mean = (weights * GRID).sum()
    centred = GRID - mean
    return CentralMoments(mean, (weights * centred**2).sum(), (weights * centred**3).sum())


def exact_x0(path, x_t, t):
    """Return the moments of q(x_0 | x_t), by Bayes' rule."""
    a, s = path.signal_and_noise(t, x_t)
    return quadrature(MIXTURE.log_prob(GRID[:, None]) - (x_t - a * GRID).square().flatten() / (2 * s.item() ** 2))


def exact_xs(path, x_t, t, s):
    """Return the moments of q(x_s | x_t), by Bayes' rule."""
    (a_t, s_t), (a_s, s_s) = (tuple(v.item() for v in path.signal_and_noise(time, x_t)) for time in (t, s))
    a_ts = a_t / a_s
    beta = s_t**2 - a_ts**2 * s_s**2
    prior = MIXTURE.diffused(a_s, s_s).log_prob(GRID[:, None])
    return quadrature(prior - (x_t.item() - a_ts * GRID).square() / (2 * beta))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t, s", [(999, 700), (700, 400), (400, 100), (100, 20)])
def test_moments_of_a_step_are_those_of_its_distribution(path, kind, t, s):
    t, s, x_t = torch.tensor([t]), torch.tensor([s]), torch.tensor([[0.35]], dtype=torch.float64)
    known = exact_x0(path, x_t, t)
    a_t, s_t = path.signal_and_noise(t, x_t)
    mean = known.mean.view(1, 1)
    prediction = path.target(mean, (x_t - a_t * mean) / s_t, t, kind)
    v_per_x0 = -(a_t**2 + s_t**2) / s_t  # because v = a eps - s x_0 and eps = (x_t - a x_0) / s
    x0 = x0_moments(path, prediction, known.variance * v_per_x0**2, known.third * v_per_x0**3, x_t, t, kind)
    found, _ = reverse_moments(path, x0, x_t, t, s)
    wanted = exact_xs(path, x_t, t, s)
    for name in ("mean", "variance", "third"):
        assert getattr(found, name).item() == pytest.approx(getattr(wanted, name).item(), rel=1e-6, abs=1e-8), name


def random_moments(count=2000):
    generator = torch.Generator().manual_seed(0)
    mean, third = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return CentralMoments(mean, 0.05 + torch.rand(count, generator=generator, dtype=torch.float64), third)


def test_moments_of_two_gaussians_are_those_of_their_density():
    first, second, variance = torch.tensor([0.7, -0.4, 0.3], dtype=torch.float64)
    known = quadrature(
        torch.logsumexp(
            torch.stack(
                [
                    w.log() - (GRID - m).square() / (2 * variance)
                    for w, m in ((torch.tensor(1 / 3), first), (torch.tensor(2 / 3), second))
                ]
            ),
            dim=0,
        )
    )
    found = moments_of(first, second, variance)
    for name in ("mean", "variance", "third"):
        assert getattr(found, name).item() == pytest.approx(getattr(known, name).item(), rel=1e-6), name


def test_two_gaussians_match_the_given_moments():
    moments = random_moments()
    first, second, variance = two_gaussians(moments, torch.zeros(()).double())
    found = moments_of(first, second, variance)
    assert torch.allclose(found.mean, moments.mean, atol=1e-10)
    assert torch.allclose(found.variance, moments.variance, atol=1e-10)
    reachable = moments.third.abs() < moments.variance**1.5 / 2**0.5
    assert 0.2 < reachable.double().mean() < 0.9
    assert torch.allclose(found.third[reachable], moments.third[reachable], atol=1e-10)
    # Beyond that, the components become points, which have the largest possible skewness for these weights.
    assert torch.allclose(found.third[~reachable].abs(), moments.variance[~reachable] ** 1.5 / 2**0.5)
    assert (variance >= 0).all() and (variance[~reachable] < 1e-12).all()


def test_a_floor_keeps_mean_and_variance():
    moments, floor = random_moments(), torch.tensor(0.3).double()
    first, second, variance = two_gaussians(moments, floor)
    found = moments_of(first, second, variance)
    assert torch.allclose(found.mean, moments.mean) and variance.min() >= floor - 1e-12
    assert torch.allclose(found.variance, torch.maximum(moments.variance, floor))


def test_without_skewness_both_components_coincide():
    moments = CentralMoments(torch.ones(3), torch.full((3,), 2.0), torch.zeros(3))
    first, second, variance = two_gaussians(moments, torch.zeros(()))
    assert torch.allclose(first, second) and torch.allclose(variance, moments.variance)
