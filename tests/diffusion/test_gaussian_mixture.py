import math

import pytest
import torch

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture, choose
from ldm_smd.diffusion.process import DiffusionProcess

GRID = torch.linspace(-9, 9, 361, dtype=torch.float64)
CELL = float(GRID[1] - GRID[0]) ** 2
POINTS = torch.cartesian_prod(GRID, GRID)


@pytest.fixture(scope="module")
def mixture():
    """A mixture in two dimensions of three components with full covariances and unequal weights."""
    roots = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariances = 0.3 * roots @ roots.mT + 0.15 * torch.eye(2, dtype=torch.float64)
    means = torch.tensor([[-1.5, 0.0], [1.0, 1.2], [0.5, -1.4]], dtype=torch.float64)
    return GaussianMixture.from_covariances(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, covariances)


def normal(x, mean, variance):
    """Return the density of N(mean, variance I) over the last axis."""
    return torch.exp(-0.5 * (x - mean).square().sum(-1) / variance) / (2 * math.pi * variance) ** (x.shape[-1] / 2)


def test_density_and_moments_agree_with_quadrature(mixture):
    density = mixture.log_prob(POINTS).exp() * CELL
    mean = density @ POINTS
    covariance = torch.einsum("n,nd,ne->de", density, POINTS - mean, POINTS - mean)
    assert density.sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose(mean, mixture.mean(), atol=1e-10)
    assert torch.allclose(covariance, mixture.covariance(), atol=1e-10)


def test_marginal_is_the_convolution(mixture):
    a, s = 0.6, 0.8
    x = torch.tensor([[0.3, -0.7], [1.5, 0.1]], dtype=torch.float64)
    prior = mixture.log_prob(POINTS).exp() * CELL
    expected = torch.stack([(prior * normal(point, a * POINTS, s**2)).sum() for point in x])
    assert torch.allclose(mixture.diffused(a, s).log_prob(x), expected.log(), atol=1e-10)


def test_score_is_the_gradient_of_the_log_density(mixture):
    marginal = mixture.diffused(0.8, 0.6)
    x = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(marginal.log_prob(x).sum(), x)
    assert torch.allclose(marginal.score(x), gradient, atol=1e-10)


def test_score_gives_the_posterior_mean(mixture):
    """Tweedie's formula: E[x_0 | x_t] = (x_t + s^2 score) / a."""
    a, s = 0.7, math.sqrt(1 - 0.49)
    x = torch.randn(20, 2, dtype=torch.float64)
    expected = (x + s**2 * mixture.diffused(a, s).score(x)) / a
    assert torch.allclose(mixture.posterior(x, a, s).mean(), expected, atol=1e-10)


def test_posterior_agrees_with_quadrature(mixture):
    a, s = 0.6, 0.8
    x = torch.tensor([[0.3, -0.7], [1.5, 0.1]], dtype=torch.float64)
    posterior = mixture.posterior(x, a, s)
    for row, point in enumerate(x):
        weight = mixture.log_prob(POINTS).exp() * normal(point, a * POINTS, s**2)
        weight = weight / weight.sum()
        mean = weight @ POINTS
        assert torch.allclose(posterior.mean()[row], mean, atol=1e-10)
        variance = weight @ (POINTS - mean).square().sum(1)
        assert posterior.total_variance()[row].item() == pytest.approx(variance.item(), abs=1e-10)
    density = posterior.log_prob(POINTS[::97][: len(x)])
    at = POINTS[::97][: len(x)]
    joint = mixture.log_prob(at) + normal(x, a * at, s**2).log()
    evidence = mixture.diffused(a, s).log_prob(x)
    assert torch.allclose(density, joint - evidence, atol=1e-10)  # Bayes' rule


def test_reverse_step_follows_from_the_forward_step_by_bayes_rule(mixture):
    """q(x_s | x_t) = q(x_t | x_s) p(x_s) / p(x_t) for all pairs of points."""
    process = DiffusionProcess(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    t, s = torch.tensor([2]), torch.tensor([0])
    (a_t, s_t), (a_s, s_s) = (process.signal_and_noise(step, torch.zeros(1)) for step in (t, s))
    x_t, x_s = torch.randn(2, 30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a_ts = a_t / a_s
    forward = normal(x_t, a_ts * x_s, s_t**2 - a_ts**2 * s_s**2).log()
    expected = forward + mixture.diffused(a_s, s_s).log_prob(x_s) - mixture.diffused(a_t, s_t).log_prob(x_t)
    assert torch.allclose(mixture.reverse(x_t, a_t, s_t, a_s, s_s).log_prob(x_s), expected, atol=1e-10)


def test_samples_have_the_moments_of_the_mixture(mixture):
    generator = torch.Generator().manual_seed(0)
    x = mixture.sample(200_000, generator)
    assert torch.allclose(x.mean(0), mixture.mean(), atol=0.02)
    assert torch.allclose(torch.cov(x.T), mixture.covariance(), atol=0.03)
    conditional = mixture.posterior(x[:2], 0.6, 0.8)
    draws = conditional.sample(100_000, generator)
    assert draws.shape == (2, 100_000, 2)
    assert torch.allclose(draws.mean(1), conditional.mean(), atol=0.02)
    assert torch.allclose(draws.var(1).sum(-1), conditional.total_variance(), rtol=0.02)


def test_invalid_weights_and_covariances_are_refused(mixture):
    with pytest.raises(ValueError, match="weights: expected positive numbers that sum to 1"):
        GaussianMixture.from_covariances(torch.tensor([0.5, 0.6]), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2))
    with pytest.raises(ValueError, match="covariances: expected none with a negative eigenvalue"):
        GaussianMixture.from_covariances(torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))


def test_components_are_chosen_by_their_responsibilities_also_at_0_and_1():
    """Even if the responsibilities sum to slightly less than 1 because of rounding."""
    responsibilities = torch.tensor([[0.25, 0.5, 0.25 - 1e-6]]).expand(5, 3)
    uniform = torch.tensor([[0.0], [0.2], [0.3], [0.8], [1.0]])
    assert choose(responsibilities, uniform).tolist() == [0, 0, 1, 2, 2]
