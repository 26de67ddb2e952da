"""GMSScheduler on data from a Gaussian mixture, for which all moments are known."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ldm_smd.diffusion.central_moments import reverse_moments, two_gaussians, x0_moments
from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import PREDICTION_TYPES, DiffusionConfig
from ldm_smd.schedulers import gms, make_scheduler
from ldm_smd.schedulers.gms import GMSScheduler
from ldm_smd.schedulers.schedule import build_scheduler

SCHEDULER = build_scheduler(DiffusionConfig())
MIXTURE = GaussianMixture.isotropic(torch.tensor([[-1.2], [0.3], [1.0]]).double(), 0.1)


def scheduler(**options):
    return GMSScheduler.from_config(SCHEDULER.config, **options)


def exact_output(x_t, t, kind="v_prediction"):
    """Return the output (B, 3, 1, 1) of a perfect network with moment heads for x_t (B, 1, 1, 1)."""
    process = DiffusionProcess(SCHEDULER.alphas_cumprod.double())
    points = x_t.flatten(1).double()
    time = torch.as_tensor(t).reshape(1)
    a, s = (v.item() for v in process.signal_and_noise(time, points))
    posterior = MIXTURE.posterior(points, a, s)
    mean = posterior.mean()
    apart = posterior.means[..., 0] - mean
    variance = (posterior.weights * (apart**2 + posterior.variances[:, 0])).sum(dim=1)
    third = (posterior.weights * (apart**3 + 3 * apart * posterior.variances[:, 0])).sum(dim=1)
    prediction = process.target(mean, (points - a * mean) / s, time, kind)
    output = torch.stack((prediction[:, 0], variance / s**2, -third / s**3), dim=1)
    return output[..., None, None].to(x_t.dtype)


def kernel_error(steps, variance_of):
    """Return the energy distance 2 integral (F - G)^2 between kernel and q(x_s | x_t), averaged over the steps and over x_t."""
    process, grid = DiffusionProcess(SCHEDULER.alphas_cumprod.double()), torch.linspace(-5, 5, 2001).double()
    chain = scheduler()
    chain.set_timesteps(steps)
    errors = []
    for t, s in zip(chain.timesteps[:-1], chain.timesteps[1:]):
        t, s = t.view(1), s.view(1)
        like = torch.zeros(1, 1).double()
        (a_t, s_t), (a_s, s_s) = (tuple(v.flatten()[0] for v in process.signal_and_noise(time, like)) for time in (t, s))
        x_t = MIXTURE.diffused(a_t, s_t).sample(200, torch.Generator().manual_seed(0))
        exact = MIXTURE.reverse(x_t, a_t, s_t, a_s, s_s)
        prediction, variance, third = exact_output(x_t[..., None, None], t)[..., 0, 0].split(1, dim=1)
        x0 = x0_moments(process, prediction, variance, third, x_t, t, "v_prediction")
        moments, v = reverse_moments(process, x0, x_t, t, s)
        weights, means, variances = variance_of(moments, v)
        learned = cdf(grid, weights, means, variances)
        wanted = cdf(grid, exact.weights, exact.means[..., 0], exact.variances[:, 0].expand_as(exact.weights))
        errors.append(2 * (learned - wanted).square().sum(dim=1).mean() * (grid[1] - grid[0]))
    return float(torch.stack(errors).mean())


def cdf(grid, weights, means, variances):
    """Return the cumulative distribution functions of Gaussian mixtures (N, K) on the grid, (N, points)."""
    return (weights[..., None] * torch.special.ndtr((grid - means[..., None]) / variances[..., None].sqrt())).sum(dim=1)


def one_gaussian(fraction):
    """Return kernels N(M, v + fraction (C - v)). 0 gives DDPM's, 1 the exact variance."""
    return lambda moments, v: (torch.ones_like(moments.mean), moments.mean, v + fraction * (moments.variance - v))


def two_gaussians_above(floor):
    def kernel(moments, v):
        first, second, variance = two_gaussians(moments, floor(moments, v))
        weights = torch.tensor([1 / 3, 2 / 3]).double().expand(len(first), 2)
        return weights, torch.cat((first, second), dim=1), variance.expand(-1, 2)

    return kernel


@pytest.mark.parametrize("steps", [5, 10, 25])
def test_two_gaussians_are_closer_to_the_exact_step_than_one(steps):
    """The floor of the scheduler is better than others. The floor of the paper is worse than one Gaussian."""
    fraction = scheduler().config.within_component_fraction
    ours = kernel_error(steps, two_gaussians_above(lambda moments, v: v + fraction * (moments.variance - v)))
    least = kernel_error(steps, two_gaussians_above(lambda moments, v: v))
    paper = kernel_error(steps, two_gaussians_above(lambda moments, v: 0.1 * v))
    exact_variance, ddpm = (kernel_error(steps, one_gaussian(s)) for s in (1.0, 0.0))
    assert ours < least < exact_variance < paper < ddpm


def test_samples_are_closer_to_the_data_than_those_of_ddpm():
    count = 20_000
    data = MIXTURE.sample(count, torch.Generator().manual_seed(1)).flatten()
    ancestral = sample(DDPMScheduler.from_config(SCHEDULER.config), 10, count, outputs=1)
    ours = sample(scheduler(), 10, count)
    distance = [(x.sort().values - data.sort().values).abs().mean() for x in (ours, ancestral)]
    assert distance[0] < 0.5 * distance[1]


def sample(chain, steps, count, outputs=3):
    chain.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 1, 1, generator=generator)
    for t in chain.timesteps:
        x = chain.step(exact_output(x, t)[:, :outputs], t, x, generator=generator).prev_sample
    return x.flatten().double()


def exact_step(x_t, t, s, count):
    """Draw samples of q(x_s | x_t) for one x_t (1, 1, 1, 1)."""
    process = DiffusionProcess(SCHEDULER.alphas_cumprod.double())
    both = (process.signal_and_noise(torch.tensor([time]), x_t.double()) for time in (t, s))
    at = (value.flatten()[0] for pair in both for value in pair)
    return MIXTURE.reverse(x_t.flatten(1).double(), *at).sample(count, torch.Generator().manual_seed(1))[0, :, 0]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_step_has_the_exact_moments_for_every_prediction_type(kind):
    t, s, count = 900, 700, 400_000
    chain = GMSScheduler.from_config(SCHEDULER.config, prediction_type=kind, within_component_fraction=0.0)
    chain.set_timesteps(timesteps=[t, s])
    x_t = torch.full((count, 1, 1, 1), 0.35)
    output = exact_output(x_t[:1], t, kind).expand(count, -1, -1, -1)
    drawn = chain.step(output, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample.double().flatten()
    exact = exact_step(x_t[:1], t, s, count)
    for power in (1, 2, 3):
        centre = 0.0 if power == 1 else exact.mean()
        wanted = (exact - centre).pow(power)
        error = (drawn - centre).pow(power).mean() - wanted.mean()
        assert error.abs() < 8 * wanted.std() / count**0.5, power


def test_two_moments_give_the_exact_mean_and_variance():
    t, s, count = 900, 700, 100_000
    chain = scheduler(num_moments=2)
    chain.set_timesteps(timesteps=[t, s])
    x_t = torch.full((count, 1, 1, 1), 0.35)
    output = exact_output(x_t[:1], t).expand(count, -1, -1, -1)
    drawn = chain.step(output, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample.double().flatten()
    exact = exact_step(x_t[:1], t, s, count)
    assert drawn.mean().item() == pytest.approx(exact.mean().item(), abs=0.01)
    assert drawn.var().item() == pytest.approx(exact.var().item(), rel=0.03)


def test_a_fraction_of_the_variance_due_to_x0_stays_within_the_components(monkeypatch):
    floors, real = [], two_gaussians
    monkeypatch.setattr(gms, "two_gaussians", lambda moments, floor: floors.append(floor) or real(moments, floor))
    chain, process = scheduler(within_component_fraction=0.3), DiffusionProcess(SCHEDULER.alphas_cumprod)
    chain.set_timesteps(timesteps=[900, 700])
    x_t, t, s = torch.full((1, 1, 1, 1), 0.35), torch.tensor([900]), torch.tensor([700])
    prediction, variance, third = exact_output(x_t, 900).chunk(3, dim=1)
    chain.step(torch.cat((prediction, variance, third), dim=1), 900, x_t)
    x0 = x0_moments(process, prediction, variance, third, x_t, t, "v_prediction")
    moments, v = reverse_moments(process, x0, x_t, t, s)
    assert torch.allclose(floors[0], 0.7 * v + 0.3 * moments.variance, rtol=1e-4) and (moments.variance > 1.1 * v).all()


def test_predictions_of_x0_are_clipped_to_the_given_range():
    chain = scheduler(clip_sample=True, clip_sample_range=0.5, prediction_type="sample")
    chain.set_timesteps(2)
    x0 = torch.tensor([-3.0, -0.2, 0.4, 2.0]).view(4, 1, 1, 1)
    output = torch.cat((x0, torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)), dim=1)
    assert chain.step(output, chain.timesteps[-1], torch.zeros(4, 1, 1, 1)).prev_sample.flatten().tolist() == pytest.approx(
        [-0.5, -0.2, 0.4, 0.5]
    )


def test_a_sample_does_not_depend_on_its_batch():
    chain = scheduler()
    chain.set_timesteps(4)
    x_t, t = torch.randn(3, 2, 4, 4), chain.timesteps[1]
    output = torch.cat((torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 4)), dim=1)

    def step(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return chain.step(output[rows], t, x_t[rows], generator=generators, return_dict=False)[0]

    assert torch.equal(step([0, 1, 2])[1:], step([1, 2]))


def test_choose_per_image_takes_one_component_for_all_elements():
    """If the components are points and there is no noise, all elements of an image are on the same side of their means."""
    chain = scheduler(choose_per_image=True, within_component_fraction=0.0)
    chain.set_timesteps(timesteps=[999, 0])
    output = torch.cat((torch.zeros(64, 1, 4, 4), torch.full((64, 1, 4, 4), 0.5), torch.full((64, 1, 4, 4), 50.0)), dim=1)
    t = chain.timesteps[0]
    moved = chain.step(output, t, torch.zeros(64, 1, 4, 4), generator=torch.Generator().manual_seed(0)).prev_sample
    positive = (moved > 0).flatten(1).double().mean(dim=1)
    assert ((positive < 0.25) | (positive > 0.75)).double().mean() > 0.9


def test_the_fit_of_the_paper_is_farther_from_the_moments():
    t, s, count = 900, 400, 100_000
    x_t = torch.full((count, 1, 1, 1), 0.35)
    output = exact_output(x_t[:1], t).expand(count, -1, -1, -1)
    exact = exact_step(x_t[:1], t, s, count)
    errors = []
    for chain in (scheduler(), scheduler(fit_iterations=70)):
        chain.set_timesteps(timesteps=[t, s])
        drawn = chain.step(output, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample.double().flatten()
        errors.append((float((drawn.mean() - exact.mean()).abs()), float((drawn.var() - exact.var()).abs())))
    assert max(errors[0]) < 0.01 < max(errors[1]) < 0.1, errors


def test_saving_and_loading_and_invalid_settings(tmp_path):
    scheduler(num_moments=2).save_pretrained(tmp_path)
    again = GMSScheduler.from_pretrained(tmp_path)
    assert again.config.num_moments == 2 and torch.equal(again.alphas_cumprod, SCHEDULER.alphas_cumprod)
    assert DDIMScheduler.from_config(again.config).config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match=r"expected 6 channels.*found 2; tools/train_moments.py"):
        again.step(torch.zeros(1, 2, 4, 4), 999, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="num_moments: expected 2 or 3"):
        scheduler(num_moments=4)
    with pytest.raises(ValueError, match="fit_iterations: expected 0 or more"):
        scheduler(fit_iterations=-1)
    with pytest.raises(ValueError, match="within_component_fraction: expected 0 to 1"):
        scheduler(within_component_fraction=2.0)


def old_config():
    """Return a config with the old names of settings."""
    return {name: value for name, value in scheduler().config.items() if name not in GMSScheduler.RENAMED.values()} | OLD_NAMES


OLD_NAMES = {"picture_draws": True, "inside_share": 0.3}


@pytest.mark.parametrize(
    "make",
    [
        lambda: GMSScheduler(**OLD_NAMES),
        lambda: scheduler(**OLD_NAMES),
        lambda: GMSScheduler.from_config(old_config()),
        lambda: make_scheduler("GMSScheduler:picture_draws=true,inside_share=0.3", SCHEDULER),
    ],
    ids=["constructor", "from_config", "saved config", "by name"],
)
def test_old_names_of_settings_still_work(make):
    with pytest.warns(FutureWarning) as warned:
        config = make().config
    assert (config.choose_per_image, config.within_component_fraction) == (True, 0.3)
    assert sorted(str(warning.message) for warning in warned) == [
        "inside_share is deprecated, use within_component_fraction",
        "picture_draws is deprecated, use choose_per_image",
    ]


def test_a_setting_given_by_its_old_and_new_name_is_refused():
    with pytest.raises(TypeError, match="choose_per_image: expected one value, found its former name picture_draws too"):
        GMSScheduler(picture_draws=True, choose_per_image=True)
