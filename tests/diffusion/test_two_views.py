import pytest
import torch

from ldm_smd.diffusion.two_views import draw_second_timesteps, joined_view, posterior_flow
from tests.diffusion.paths import PATHS


def three_modes():
    """Return a grid, and the log density on it of data with three modes."""
    grid = torch.linspace(-4.0, 4.0, 20_001, dtype=torch.float64)
    modes = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    return grid, (weights @ torch.exp(-((grid - modes[:, None]) ** 2) / (2 * 0.15**2))).log()


def log_likelihoods(path, view, t, grid):
    """Return the log likelihoods (B, N) of the points x_0 of the grid, given a view (B, 1, 1, 1)."""
    a, s = path.signal_and_noise(t, view)
    return -((view - a * grid) ** 2).flatten(1) / (2 * s.flatten(1) ** 2)


@pytest.mark.parametrize("path", PATHS)
def test_the_joined_view_is_equivalent_to_both_views(path):
    """E[x_0 | x_t, x_r] equals E[x_0 | x_u], by quadrature over data with three modes."""
    x = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64).view(3, 1, 1, 1)
    y = torch.tensor([0.1, -1.2, 0.4], dtype=torch.float64).view(3, 1, 1, 1)
    t, r = torch.tensor([900, 500, 300]), torch.tensor([400, 500, 800])
    x_u, u = joined_view(path, x, t, y, r)

    grid, log_prior = three_modes()

    def log_likelihood(view, timestep):
        return log_likelihoods(path, view, timestep, grid)

    def mean(log_likelihoods):
        return torch.softmax(log_likelihoods + log_prior, dim=1) @ grid

    both = mean(log_likelihood(x, t) + log_likelihood(y, r))
    assert torch.allclose(mean(log_likelihood(x_u, u)), both, atol=1e-4)
    assert not torch.allclose(mean(log_likelihood(x, t)), both, atol=0.1)
    assert (u < torch.minimum(t, r)).all()


@pytest.mark.parametrize("path", PATHS)
def test_timestep_of_inverts_the_signal_to_noise_ratio(path):
    t = torch.tensor([1.0, 20.0, 300.25, 600.5, 998.0], dtype=torch.float64)
    a, s = path.signal_and_noise(t, t)
    assert torch.allclose(path.timestep_of((a / s) ** 2).double(), t, atol=1e-2)
    assert path.timestep_of(torch.tensor([1e12], dtype=torch.float64)).item() == pytest.approx(0.0, abs=1e-2)


@pytest.mark.parametrize("path", PATHS)
def test_a_shift_divides_the_signal_to_noise_ratio_of_the_second_view(path):
    drawn = {k: draw_second_timesteps(path, 10_000, k, torch.Generator().manual_seed(0)) for k in (1.0, 4.0)}
    assert drawn[1.0].dtype == torch.long and drawn[1.0].min() == 20 and drawn[1.0].max() == round(0.98 * path.last)
    assert drawn[1.0].double().mean().item() == pytest.approx(0.5 * path.last, rel=0.02)
    clean, noisy = (torch.quantile(found.double(), 0.5).reshape(1) for found in drawn.values())
    (a, s), (a_noisy, s_noisy) = (path.signal_and_noise(t, t) for t in (clean, noisy))
    assert (a / s / (a_noisy / s_noisy)).item() == pytest.approx(4.0, rel=0.02) and drawn[4.0].max() <= path.last


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [300, 700, 950])
def test_the_posterior_flow_samples_the_posterior(path, t):
    """In one dimension a flow is monotonic, so it maps the quantiles of eta to those of q(x_0 | x_t)."""
    grid, log_prior = three_modes()
    quantiles = torch.tensor([0.03, 0.2, 0.4, 0.6, 0.8, 0.97], dtype=torch.float64)
    eta = torch.special.ndtri(quantiles).view(-1, 1, 1, 1)
    x_t, t = torch.full_like(eta, 0.4), torch.full((len(eta),), t)

    def denoise(x, u):
        return (torch.softmax(log_likelihoods(path, x, u, grid) + log_prior, dim=1) @ grid).view_as(x)

    posterior = torch.softmax(log_likelihoods(path, x_t[:1], t[:1], grid) + log_prior, dim=1)[0]
    expected = grid[torch.searchsorted(posterior.cumsum(0), quantiles)]
    errors = [
        (posterior_flow(denoise, path, x_t, t, eta, steps).flatten() - expected).abs().max().item() for steps in (1, 10, 100)
    ]
    assert errors[0] > 0.1 and errors[2] < 0.02 and errors[2] < errors[1]
    mean_error = (posterior_flow(denoise, path, x_t, t, eta, 80).flatten() - expected).abs().mean().item()
    assert mean_error < 0.0045, "without the correction of second order it is 0.006 or more"
