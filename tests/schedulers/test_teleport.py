"""TeleportScheduler on Gaussian data, for which the perfect network and the probability flow are known."""

import pytest
import torch

from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.errors import UserError
from ldm_smd.models.gaussian import LatentGaussians
from ldm_smd.schedulers import TeleportScheduler, make_scheduler
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.schedulers.support import WITHOUT_SAMPLE_PREDICTION

SCHEDULER = build_scheduler(DiffusionConfig())
ODE = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
]
SDE = ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++"]


def one_gaussian():
    """Return a Gaussian in 4 dimensions."""
    generator = torch.Generator().manual_seed(0)
    gaussians = LatentGaussians(1, 2, 2, rank=3)
    vectors, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    gaussians.means[0] = torch.tensor([0.5, -1.0, 0.0, 2.0])
    gaussians.vectors[0], gaussians.variances[0], gaussians.tails[0] = vectors[:, :3].T, torch.tensor([1.5, 0.4, 0.1]), 0.05
    return gaussians


def covariance(gaussians):
    vectors, variances, tail = gaussians.vectors[0], gaussians.variances[0], gaussians.tails[0]
    return tail * torch.eye(4) + vectors.T @ torch.diag(variances - tail) @ vectors


def perfect_network(gaussians, x_t, t):
    """Predict v for Gaussian data, from E[x_0 | x_t] = m + a S (a^2 S + s^2 I)^-1 (x_t - a m)."""
    process, x = DiffusionProcess(SCHEDULER.alphas_cumprod), x_t.flatten(1)
    time = torch.as_tensor(t).reshape(1).round().long()
    a, s = process.signal_and_noise(time, x)
    sigma = covariance(gaussians)
    x0 = gaussians.means + (x - a * gaussians.means) @ torch.linalg.solve(a**2 * sigma + s**2 * torch.eye(4), a * sigma)
    return process.target(x0, (x - a * x0) / s, time, "v_prediction").view_as(x_t)


def sample(scheduler, gaussians, noise, steps):
    scheduler.set_timesteps(steps)
    x = scheduler.start(noise, gaussians)
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        x = scheduler.step(perfect_network(gaussians, x_t, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", ODE)
def test_ode_solvers_continue_from_the_end_of_the_flow(name):
    """Flow and solver together give the same result as the flow alone down to zero noise."""
    gaussians, noise = one_gaussian(), torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    scheduler = TeleportScheduler.from_config(SCHEDULER.config, scheduler=name, sigma_skip=3.0)
    found = sample(scheduler, gaussians, noise, 60)
    assert float(scheduler.timesteps[0]) < 850
    alphabar = float(SCHEDULER.alphas_cumprod[-1])
    exact = gaussians.transport(noise, (alphabar**0.5, (1 - alphabar) ** 0.5), (1.0, 0.0))
    assert torch.allclose(found, exact, atol=0.06), float((found - exact).abs().max())


@pytest.mark.parametrize("name", SDE)
def test_sde_solvers_give_the_mean_and_covariance_of_the_data(name):
    torch.manual_seed(0)
    gaussians, noise = one_gaussian(), torch.randn(20_000, 1, 2, 2)
    scheduler = TeleportScheduler.from_config(SCHEDULER.config, scheduler=name, sigma_skip=3.0)
    found = sample(scheduler, gaussians, noise, 100).flatten(1)
    assert torch.allclose(found.mean(dim=0), gaussians.means[0], atol=0.03)
    assert torch.allclose(torch.cov(found.T), covariance(gaussians), atol=0.06)


def test_nothing_is_skipped_if_sigma_skip_is_above_the_schedule():
    """The noise, in the units of the scheduler, only gets the small signal of the last timestep."""
    scheduler = TeleportScheduler.from_config(SCHEDULER.config, scheduler="DDIMScheduler", sigma_skip=1e9)
    scheduler.set_timesteps(10)
    noise = torch.randn(2, 1, 2, 2)
    plain = make_scheduler("DDIMScheduler", SCHEDULER)
    plain.set_timesteps(10)
    assert torch.equal(scheduler.timesteps, plain.timesteps)
    # The schedule ends with a signal of 0.0008.
    gaussians, signal = one_gaussian(), SCHEDULER.alphas_cumprod[-1].sqrt()
    assert torch.allclose(scheduler.start(noise, gaussians), noise + signal * gaussians.means.view(1, 1, 2, 2), atol=1e-5)


@pytest.mark.parametrize("shape", [{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {}])
def test_samples_have_the_mean_of_the_data_for_any_schedule(shape):
    """Also if it ends with signal, as that of Stable Diffusion: the noise has none."""
    schedule = build_scheduler(DiffusionConfig(**shape))
    gaussians, path = one_gaussian(), DiffusionProcess(schedule.alphas_cumprod)
    scheduler = make_scheduler("TeleportScheduler:scheduler=DDIMScheduler", schedule)
    noise = torch.randn(20_000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(5)
    start = scheduler.start(noise, gaussians).flatten(1)
    a, s = (float(level) for level in path.signal_and_noise(scheduler.timesteps[:1], scheduler.timesteps))
    assert torch.allclose(start.mean(dim=0), a * gaussians.means[0], atol=0.03)
    assert torch.allclose(torch.cov(start.T), a**2 * covariance(gaussians) + s**2 * torch.eye(4), atol=0.05)


@pytest.mark.parametrize("name", WITHOUT_SAMPLE_PREDICTION)
def test_predictions_of_x0_are_converted_for_schedulers_that_cannot_take_them(name):
    predicts_x0 = build_scheduler(DiffusionConfig(prediction_type="sample"))
    scheduler = make_scheduler(f"TeleportScheduler:scheduler={name}", predicts_x0)
    assert scheduler.config.prediction_type == scheduler.rest.config.prediction_type == "v_prediction"


def test_runs_are_independent_and_fewer_timesteps_are_used():
    scheduler = make_scheduler("TeleportScheduler:scheduler=UniPCMultistepScheduler,sigma_skip=2.5", SCHEDULER)
    gaussians, noise = one_gaussian(), torch.randn(3, 1, 2, 2)
    first = sample(scheduler, gaussians, noise, 6)
    assert torch.equal(first, sample(scheduler, gaussians, noise, 6))
    sigma = ((1 - SCHEDULER.alphas_cumprod) / SCHEDULER.alphas_cumprod).sqrt()
    assert sigma[int(scheduler.timesteps[0])] <= 2.5 < sigma[int(scheduler.timesteps[0]) + 1]


def test_saving_and_loading_and_invalid_settings(tmp_path):
    name = "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++"
    TeleportScheduler.from_config(SCHEDULER.config, scheduler=name, sigma_skip=4.0).save_pretrained(tmp_path)
    again = TeleportScheduler.from_pretrained(tmp_path)
    assert again.rest.config.algorithm_type == "sde-dpmsolver++" and again.rest.config.prediction_type == "v_prediction"
    assert again.config.sigma_skip == 4.0 and torch.allclose(again.alphas_cumprod, SCHEDULER.alphas_cumprod)
    with pytest.raises(ValueError, match="sigma_skip: expected at least"):
        TeleportScheduler.from_config(SCHEDULER.config, sigma_skip=1e-9)
    with pytest.raises(UserError, match="scheduler: expected a scheduler class"):
        TeleportScheduler.from_config(SCHEDULER.config, scheduler="Heun")
