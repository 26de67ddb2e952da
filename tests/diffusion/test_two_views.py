import pytest
import torch

from ldm_smd.diffusion.two_views import joined_view
from tests.diffusion.paths import PATHS


@pytest.mark.parametrize("path", PATHS)
def test_one_view_says_what_two_say(path):
    """E[x_0 | x_t, x_r] by quadrature, over data with three modes, equals E[x_0 | x_u]."""
    grid = torch.linspace(-4.0, 4.0, 20_001, dtype=torch.float64)
    modes = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64)
    prior = torch.tensor([0.2, 0.5, 0.3]) @ torch.exp(-((grid - modes[:, None]) ** 2) / (2 * 0.15**2)).float()
    x = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64).view(3, 1, 1, 1)
    y = torch.tensor([0.1, -1.2, 0.4], dtype=torch.float64).view(3, 1, 1, 1)
    t, r = torch.tensor([900, 500, 300]), torch.tensor([400, 500, 800])
    x_u, u = joined_view(path, x, t, y, r)

    def log_likelihood(view, timestep):
        a, s = path.signal_and_noise(timestep, view)
        return -((view - a * grid) ** 2).flatten(1) / (2 * s.flatten(1) ** 2)

    def mean(log_likelihoods):
        weights = torch.softmax(log_likelihoods + prior.double().log(), dim=1)
        return weights @ grid

    both = mean(log_likelihood(x, t) + log_likelihood(y, r))
    assert torch.allclose(mean(log_likelihood(x_u, u)), both, atol=1e-4)
    assert not torch.allclose(mean(log_likelihood(x, t)), both, atol=0.1)
    assert (u < torch.minimum(t, r)).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_timestep_of_a_ratio(path):
    t = torch.tensor([1.0, 20.0, 300.25, 600.5, 998.0], dtype=torch.float64)
    a, s = path.signal_and_noise(t, t)
    assert torch.allclose(path.timestep_of((a / s) ** 2).double(), t, atol=1e-2)
    assert path.timestep_of(torch.tensor([1e12], dtype=torch.float64)).item() == pytest.approx(0.0, abs=1e-2)
