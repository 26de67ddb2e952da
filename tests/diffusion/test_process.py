import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ldm_smd.choices import PREDICTION_TYPES
from ldm_smd.config import DiffusionConfig
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.schedulers.schedule import build_scheduler

SCHEDULER = build_scheduler(DiffusionConfig())
PROCESS = DiffusionProcess(SCHEDULER.alphas_cumprod.double())


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def test_noise_and_velocity_agree_with_diffusers():
    x0, eps, t = draw(5, 3, 4, 4), draw(5, 3, 4, 4).flip(0), torch.tensor([0, 10, 400, 800, 999])
    scheduler = DDPMScheduler.from_config(SCHEDULER.config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    assert torch.allclose(PROCESS.noise(x0, eps, t), scheduler.add_noise(x0, eps, t))
    assert torch.allclose(PROCESS.target(x0, eps, t, "v_prediction"), scheduler.get_velocity(x0, eps, t))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_x0_comes_back_from_its_target(kind):
    x0, eps, t = draw(3, 2, 4, 4), draw(3, 2, 4, 4) * 0.5, torch.tensor([0, 300, 900])
    x_t = PROCESS.noise(x0, eps, t)
    assert torch.allclose(PROCESS.to_x0(PROCESS.target(x0, eps, t, kind), x_t, t, kind), x0)


def test_posterior_is_bayes_rule():
    """q(x_s | x_t, x_0) against the product of the two Gaussians q(x_t | x_s) and q(x_s | x_0) on a grid."""
    t, s = torch.tensor([600]), torch.tensor([350])
    x_t, x0 = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[-0.4]], dtype=torch.float64)
    a_t, s_t = (value.item() for value in PROCESS.signal_and_noise(t, x_t))
    a_s, s_s = (value.item() for value in PROCESS.signal_and_noise(s, x_t))
    a_ts = a_t / a_s
    beta_ts = s_t**2 - a_ts**2 * s_s**2
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    log_density = -((x_t - a_ts * grid) ** 2) / (2 * beta_ts) - (grid - a_s * x0) ** 2 / (2 * s_s**2)
    weight = torch.softmax(log_density.flatten(), 0)
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    found_mean, found_variance = PROCESS.posterior(x_t, x0, t, s)
    assert found_mean.item() == pytest.approx(mean.item(), abs=1e-9)
    assert found_variance.item() == pytest.approx(variance.item(), rel=1e-6)


def test_the_last_posterior_is_the_data():
    x_t, x0 = draw(1, 3), draw(1, 3) * 2
    mean, variance = PROCESS.posterior(x_t, x0, torch.tensor([100]), torch.tensor([-1]))
    assert torch.allclose(mean, x0) and variance.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("steps", [2, 4, 8, 32])
def test_the_schedulers_step_is_a_draw_from_the_posterior(steps):
    """DDPMScheduler as build_scheduler makes it: mean and variance of q(x_s | x_t, x_0) at every step."""
    scheduler = build_scheduler(DiffusionConfig())
    scheduler.set_timesteps(steps)
    process = DiffusionProcess(scheduler.alphas_cumprod)
    x_t, x0 = draw(1, 2000).float(), draw(1, 2000).flip(1).float()
    assert scheduler.timesteps[0] == 999
    for index, t in enumerate(scheduler.timesteps):
        s = scheduler.timesteps[index + 1] if index + 1 < steps else torch.tensor(-1)
        a, sigma = process.signal_and_noise(t.view(1), x_t)
        v = (a * x_t - x0) / sigma
        stepped = scheduler.step(v, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
        mean, variance = process.posterior(x_t, x0, t.view(1), s.view(1))
        residual = stepped - mean
        assert residual.var().item() == pytest.approx(variance.item(), rel=0.15, abs=1e-6)
        assert residual.mean().abs().item() < 0.1


def test_other_schedulers_take_the_same_configuration():
    assert DDIMScheduler.from_config(SCHEDULER.config).config.prediction_type == "v_prediction"
