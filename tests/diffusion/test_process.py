import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from ldm_smd.diffusion.process import DiffusionProcess, RectifiedFlow, prediction_coefficients, x0_per_prediction
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.schedulers.conversion import path_of
from ldm_smd.schedulers.schedule import build_scheduler
from tests.diffusion.paths import KINDS, PATHS, PROCESS, SCHEDULER


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def test_noise_and_velocity_agree_with_diffusers():
    x0, eps, t = draw(5, 3, 4, 4), draw(5, 3, 4, 4).flip(0), torch.tensor([0, 10, 400, 800, 999])
    scheduler = DDPMScheduler.from_config(SCHEDULER.config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    assert torch.allclose(PROCESS.noise(x0, eps, t), scheduler.add_noise(x0, eps, t))
    assert torch.allclose(PROCESS.target(x0, eps, t, "v_prediction"), scheduler.get_velocity(x0, eps, t))


def test_flow_and_its_velocity_agree_with_diffusers():
    """An Euler step along the exact velocity stays on the straight line from noise to data."""
    scheduler, path = FlowMatchEulerDiscreteScheduler(), RectifiedFlow(1000)
    scheduler.set_timesteps(7)
    x0, eps = draw(7, 3, 4, 4).float(), draw(7, 3, 4, 4).flip(0).float()
    x_t = path.noise(x0, eps, scheduler.timesteps)
    assert torch.allclose(x_t, scheduler.scale_noise(x0, scheduler.timesteps, eps), atol=1e-6)
    velocity = path.target(x0, eps, scheduler.timesteps, "flow_prediction")
    x_s = path.noise(x0, eps, torch.cat((scheduler.timesteps[1:], torch.zeros(1))))
    for t, *row in zip(scheduler.timesteps, velocity, x_t, x_s):
        assert torch.allclose(scheduler.step(row[0], t, row[1]).prev_sample, row[2], atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_x0_is_recovered_from_its_target(path, kind):
    x0, eps, t = draw(3, 2, 4, 4), draw(3, 2, 4, 4) * 0.5, torch.tensor([0, 300, 900])
    x_t = path.noise(x0, eps, t)
    assert torch.allclose(path.to_x0(path.target(x0, eps, t, kind), x_t, t, kind), x0)
    clean = torch.full_like(t, -1)
    assert torch.allclose(path.to_x0(path.target(x0, eps, clean, kind), x0, clean, kind), x0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_x0_per_prediction_is_the_derivative_of_x0(path, kind):
    x_t, p, error, t = draw(4, 3), draw(4, 3, 1)[..., 0], 0.3, torch.tensor([1, 300, 900, 998])
    off = path.to_x0(p + error, x_t, t, kind) - path.to_x0(p, x_t, t, kind)
    gain = x0_per_prediction(kind, *path.signal_and_noise(t, x_t))
    assert torch.allclose(off, gain * error, rtol=1e-6)
    assert x0_per_prediction("sample", torch.ones(1), torch.zeros(1)) == 1


TABLE = SCHEDULER.alphas_cumprod
LOW_PRECISION = [
    (DiffusionProcess(TABLE), DiffusionProcess(TABLE.double()), torch.float32),
    (DiffusionProcess(TABLE.half()), DiffusionProcess(TABLE.half().double()), torch.float16),
    (RectifiedFlow(1000), RectifiedFlow(1000), torch.float32),
    (RectifiedFlow(1000), RectifiedFlow(1000), torch.float16),
]


@pytest.mark.parametrize("path, exact, dtype", LOW_PRECISION)
@pytest.mark.parametrize("kind", KINDS)
def test_x0_loses_precision_only_by_cancellation(path, exact, dtype, kind):
    """In float32 and float16, the error of x_0 is a few roundings of its two terms, at every t, also for very large s / a."""
    t = torch.arange(1, 1000)
    x0, eps = draw(999, 4), draw(999, 4).flip(0)
    x_t, p = exact.noise(x0, eps, t).to(dtype), exact.target(x0, eps, t, kind).to(dtype)
    found = path.to_x0(p, x_t, t, kind).double()
    a, s = exact.signal_and_noise(t, x0)
    alpha, beta = prediction_coefficients(kind, a, s)
    terms = ((beta * x_t).abs() + (s * p).abs()) / (a * beta - s * alpha).abs()
    known = a.flatten() > 0 if kind == "epsilon" else t > 0  # without signal, eps does not determine x_0
    if kind == "sample":
        terms = p.double().abs()
    assert known.sum() > 980 and ((found - x0).abs() <= 4 * torch.finfo(dtype).eps * terms)[known].all()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_variance_preserving_process_has_its_usual_formulas(kind):
    process, t = DiffusionProcess(TABLE), torch.arange(1000)
    x_t, p = draw(1000, 4).float(), draw(1000, 4).flip(0).float()
    a, s = process.signal_and_noise(t, x_t)
    wanted = {"epsilon": (x_t - s * p) / a, "sample": p, "v_prediction": a * x_t - s * p}[kind]
    assert torch.allclose(process.to_x0(p, x_t, t, kind), wanted, rtol=1e-6, atol=1e-6)
    wanted = {"epsilon": p, "sample": x_t, "v_prediction": a * p - s * x_t}[kind]
    assert torch.equal(process.target(x_t, p, t, kind), wanted)


def test_fractional_timesteps_are_interpolated():
    """Linearly in the logarithm of the signal-to-noise ratio. Integer timesteps give exactly the values of the table."""
    process, like = DiffusionProcess(TABLE), torch.zeros(5, 1)
    integers = torch.tensor([-1, 0, 1, 500, 999])
    for found, known in zip(process.signal_and_noise(integers.float(), like), process.signal_and_noise(integers, like)):
        assert torch.equal(found, known)
    t = torch.tensor([0.5, 20.25, 600.5, 998.75, 999.0])
    table = TABLE.double().numpy()
    log_snr = np.interp(t.numpy(), np.arange(1000), np.log(table / (1 - table)))
    a, s = process.signal_and_noise(t, like)
    assert torch.allclose((2 * (a / s).log()).flatten().double(), torch.from_numpy(log_snr), atol=1e-2, rtol=1e-4)
    ends = DiffusionProcess(torch.tensor([0.5, 0.0]))  # no signal at the last timestep
    assert 0 < ends.signal_and_noise(torch.tensor([0.5]), like)[0] < 1e-2
    assert ends.signal_and_noise(torch.tensor([1.0]), like)[0] == 0


@pytest.mark.parametrize("path", PATHS)
def test_random_timesteps_are_uniform(path):
    t = path.random_t(100_000, generator=torch.Generator().manual_seed(0))
    assert 0 <= t.min() < 2 and 998 < t.max() <= path.last
    assert t.double().mean() == pytest.approx(500, abs=5) and t.double().std() == pytest.approx(1000 / 12**0.5, rel=0.01)
    a, s = path.signal_and_noise(t, t)
    assert (s > 0).all() and a.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_a_shift_divides_the_signal_to_noise_ratios_of_random_timesteps(path):
    even, shifted = (path.random_t(20_000, shift, generator=torch.Generator().manual_seed(0)) for shift in (1.0, 3.0))
    assert shifted.dtype == even.dtype and shifted.min() >= 0 and shifted.max() <= path.last
    inner = (even > 50) & (even < 900)
    (a, s), (a_shifted, s_shifted) = (path.signal_and_noise(t[inner], t[inner]) for t in (even, shifted))
    end = torch.stack(path.signal_and_noise(torch.tensor([path.last]), a)).flatten()
    assert torch.allclose(a_shifted / s_shifted, a / s / 3 + 2 / 3 * end[0] / end[1], rtol=0.02)


@pytest.mark.parametrize("shift", [4.0, 0.25])
def test_a_shift_keeps_the_end_of_a_schedule_that_ends_with_signal(shift):
    """No timestep in between is clamped to the end."""
    schedule = DiffusionConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    path = DiffusionProcess(build_scheduler(schedule).alphas_cumprod.double())
    found = path.shifted(torch.arange(1000), shift)
    assert found[-1] == pytest.approx(999) and (found.diff()[500:] > 1e-3).all()


def test_the_flow_is_a_scaled_variance_preserving_process():
    """At the same signal-to-noise ratio, x_t divided by its norm and the posterior of x_0 are the same."""
    flow, t = RectifiedFlow(10), torch.arange(1, 10)
    x0, eps = draw(9, 4), draw(9, 4).flip(0)
    a, s = flow.signal_and_noise(t, x0)
    norm = torch.hypot(a, s)
    process = DiffusionProcess(((a / norm) ** 2).flatten())
    x_t, known = flow.noise(x0, eps, t), process.noise(x0, eps, t - 1)
    assert torch.allclose(x_t / norm, known)
    earlier = t - 1
    mean, variance = flow.posterior(x_t, x0, t, earlier)
    norm_s = torch.hypot(*flow.signal_and_noise(earlier, x0))
    found, found_variance = process.posterior(known, x0, t - 1, earlier - 1)
    assert torch.allclose(mean / norm_s, found) and torch.allclose(variance / norm_s**2, found_variance)
    data = GaussianMixture.isotropic(draw(3, 4), 0.3)
    for row in range(9):
        of_flow = data.posterior(x_t[row : row + 1], a[row], s[row])
        of_process = data.posterior(known[row : row + 1], *process.signal_and_noise(t[row] - 1, x0[row]))
        assert torch.allclose(of_flow.mean(), of_process.mean())
        assert torch.allclose(of_flow.total_variance(), of_process.total_variance())


@pytest.mark.parametrize("path", PATHS)
def test_posterior_follows_bayes_rule(path):
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0), here on a grid."""
    t, s = torch.tensor([600]), torch.tensor([350])
    x_t, x0 = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[-0.4]], dtype=torch.float64)
    a_t, s_t = (value.item() for value in path.signal_and_noise(t, x_t))
    a_s, s_s = (value.item() for value in path.signal_and_noise(s, x_t))
    a_ts = a_t / a_s
    beta_ts = s_t**2 - a_ts**2 * s_s**2
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    log_density = -((x_t - a_ts * grid) ** 2) / (2 * beta_ts) - (grid - a_s * x0) ** 2 / (2 * s_s**2)
    weight = torch.softmax(log_density.flatten(), 0)
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    found_mean, found_variance = path.posterior(x_t, x0, t, s)
    assert found_mean.item() == pytest.approx(mean.item(), abs=1e-9)
    assert found_variance.item() == pytest.approx(variance.item(), rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_the_last_posterior_is_x0(path):
    x_t, x0 = draw(1, 3), draw(1, 3) * 2
    mean, variance = path.posterior(x_t, x0, torch.tensor([100]), torch.tensor([-1]))
    assert torch.allclose(mean, x0) and variance.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("steps", [2, 4, 8, 32])
def test_a_ddpm_step_samples_the_posterior(steps):
    """Every step of the DDPMScheduler of build_scheduler has the mean and variance of q(x_s | x_t, x_0)."""
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


def test_the_mathematics_imports_only_torch():
    modules = ", ".join(
        f"ldm_smd.diffusion.{name}" for name in ("process", "objectives", "central_moments", "gaussian_mixture")
    )
    script = f"import sys, {modules}; print(*{{'diffusers', 'sklearn', 'timm', 'torchvision'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split() == []


def test_other_schedulers_accept_the_same_config():
    assert DDIMScheduler.from_config(SCHEDULER.config).config.prediction_type == "v_prediction"


def test_timesteps_are_finite_where_a_schedule_has_no_signal_left():
    """A long linear schedule has many such timesteps. Their levels are clamped to the same one."""
    process = path_of(DDPMScheduler(num_train_timesteps=4000, beta_schedule="linear"))
    assert process.alphas_cumprod[-1] == process.alphas_cumprod[-2]
    t = process.random_t(1000, shift=3.0, generator=torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= process.last
    assert process.timestep_of(torch.tensor([0.0, 1e-20, 1e20])).isfinite().all()
