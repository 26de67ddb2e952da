"""TeleportScheduler on Gaussian data, where the network and the whole way are known."""

import pytest
import torch

from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.errors import UserError
from ldm_smd.models.gaussian import LatentGaussians
from ldm_smd.schedulers import TeleportScheduler, make_scheduler
from ldm_smd.schedulers.schedule import build_scheduler

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


def part():
    """One Gaussian in 4 dimensions."""
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
    """v for Gaussian data: from E[x_0 | x_t] = m + a S (a^2 S + s^2 I)^-1 (x_t - a m)."""
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
def test_any_ode_solver_goes_on_where_the_flow_ends(name):
    """Flow and solver together reach what the flow alone does at no noise."""
    gaussians, noise = part(), torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    scheduler = TeleportScheduler.from_config(SCHEDULER.config, scheduler=name, sigma_skip=3.0)
    found = sample(scheduler, gaussians, noise, 60)
    assert float(scheduler.timesteps[0]) < 850
    alphabar = float(SCHEDULER.alphas_cumprod[-1])
    exact = gaussians.transport(noise, (alphabar**0.5, (1 - alphabar) ** 0.5), (1.0, 0.0))
    assert torch.allclose(found, exact, atol=0.06), float((found - exact).abs().max())


@pytest.mark.parametrize("name", SDE)
def test_any_sde_solver_keeps_mean_and_covariance(name):
    torch.manual_seed(0)
    gaussians, noise = part(), torch.randn(20_000, 1, 2, 2)
    scheduler = TeleportScheduler.from_config(SCHEDULER.config, scheduler=name, sigma_skip=3.0)
    found = sample(scheduler, gaussians, noise, 100).flatten(1)
    assert torch.allclose(found.mean(dim=0), gaussians.means[0], atol=0.03)
    assert torch.allclose(torch.cov(found.T), covariance(gaussians), atol=0.06)


def test_the_whole_schedule_is_no_jump():
    """With sigma_skip at the start, the noise is only put into the scheduler's units."""
    scheduler = TeleportScheduler.from_config(SCHEDULER.config, scheduler="DDIMScheduler", sigma_skip=1e9)
    scheduler.set_timesteps(10)
    noise = torch.randn(2, 1, 2, 2)
    plain = make_scheduler("DDIMScheduler", SCHEDULER)
    plain.set_timesteps(10)
    assert torch.equal(scheduler.timesteps, plain.timesteps)
    assert torch.allclose(scheduler.start(noise, part()), noise, atol=1e-5)


def test_runs_are_independent_and_fewer_timesteps_are_used():
    scheduler = make_scheduler("TeleportScheduler:scheduler=UniPCMultistepScheduler,sigma_skip=2.5", SCHEDULER)
    gaussians, noise = part(), torch.randn(3, 1, 2, 2)
    first = sample(scheduler, gaussians, noise, 6)
    assert torch.equal(first, sample(scheduler, gaussians, noise, 6))
    sigma = ((1 - SCHEDULER.alphas_cumprod) / SCHEDULER.alphas_cumprod).sqrt()
    assert sigma[int(scheduler.timesteps[0])] <= 2.5 < sigma[int(scheduler.timesteps[0]) + 1]


def test_saves_and_loads_and_names_mistakes(tmp_path):
    name = "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++"
    TeleportScheduler.from_config(SCHEDULER.config, scheduler=name, sigma_skip=4.0).save_pretrained(tmp_path)
    again = TeleportScheduler.from_pretrained(tmp_path)
    assert again.rest.config.algorithm_type == "sde-dpmsolver++" and again.rest.config.prediction_type == "v_prediction"
    assert again.config.sigma_skip == 4.0 and torch.allclose(again.alphas_cumprod, SCHEDULER.alphas_cumprod)
    with pytest.raises(ValueError, match="sigma_skip: expected at least"):
        TeleportScheduler.from_config(SCHEDULER.config, sigma_skip=1e-9)
    with pytest.raises(UserError, match="scheduler: expected a scheduler class"):
        TeleportScheduler.from_config(SCHEDULER.config, scheduler="Heun")
