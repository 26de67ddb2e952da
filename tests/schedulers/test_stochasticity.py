"""SMDScheduler on data from a Gaussian mixture, where q(x_0 | x_t) is known."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import PREDICTION_TYPES, DiffusionConfig
from ldm_smd.schedulers import SMDScheduler, make_scheduler
from ldm_smd.schedulers.schedule import build_scheduler

OURS = build_scheduler(DiffusionConfig())
MIXTURE = GaussianMixture.isotropic(torch.tensor([[-1.2], [0.3], [1.0]]).double(), 0.1)
PATH = DiffusionProcess(OURS.alphas_cumprod.double())


def scheduler(steps, **options):
    made = SMDScheduler.from_config(OURS.config, **{"stochastic_above": 0.0} | options)
    made.set_timesteps(steps)
    return made


def sampled(steps, count=4000, exaggeration=1.0, **options):
    """Sample from a perfect mixture, (count,). ``exaggeration`` multiplies how far the draws are from the mean of the data."""
    generator, made = torch.Generator().manual_seed(0), scheduler(steps, prediction_type="sample", **options)
    x = torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    for t in made.timesteps:
        a, s = (float(level) for level in PATH.signal_and_noise(t.view(1), torch.zeros(1)))
        draw = MIXTURE.posterior(x.flatten(1), a, s).sample(1, generator)
        mean = MIXTURE.mean()
        draw = mean + exaggeration * (draw - mean) if t > 500 else draw
        x = made.step(draw.view_as(x), t, x, generator=generator, return_dict=False)[0].double()
    return x.flatten()


def quantile_error(samples):
    """Return the mean difference of quantiles from those of the data, in standard deviations."""
    levels = torch.linspace(0.02, 0.98, 25).double()
    data = MIXTURE.sample(200_000, torch.Generator().manual_seed(1)).flatten()
    return float((samples.quantile(levels) - data.quantile(levels)).abs().mean() / data.std())


@pytest.mark.parametrize("kind", [kind for kind in PREDICTION_TYPES if kind != "flow_prediction"])
@pytest.mark.parametrize(("stochasticity", "same", "options"), [(1.0, DDPMScheduler, {}), (0.0, DDIMScheduler, {"eta": 0.0})])
def test_one_is_ddpm_and_zero_is_ddim(kind, stochasticity, same, options):
    made = scheduler(5, stochasticity=stochasticity, prediction_type=kind)
    other = same.from_config(OURS.config, prediction_type=kind, timestep_spacing="trailing")
    other.set_timesteps(5)
    assert made.timesteps.tolist() == other.timesteps.tolist()
    x, output = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for t in made.timesteps:
        found, wanted = (
            each.step(output, t, x, generator=torch.Generator().manual_seed(2), **more)
            for each, more in ((made, {}), (other, options))
        )
        torch.testing.assert_close(found.prev_sample, wanted.prev_sample, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.pred_original_sample, wanted.pred_original_sample, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"stochasticity": p} for p in (0.0, 1.0, 2.0, 100.0)] + [{"stochastic_above": 1.0}])
@pytest.mark.parametrize("steps", [2, 6])
def test_any_stochasticity_is_exact_with_true_draws(options, steps):
    assert quantile_error(sampled(steps, **options)) < 0.06


def test_more_fresh_noise_forgets_exaggerated_draws():
    """With many steps."""
    errors = [quantile_error(sampled(24, exaggeration=1.4, stochasticity=p)) for p in (1.0, 3.0)]
    assert errors[1] < 0.7 * errors[0]


def test_the_noise_that_is_kept_does_not_depend_on_the_number_of_steps():
    """Of a sample with x_0 = 0, the mean over fresh noise is what is left of the noise."""

    def kept(timesteps):
        made = scheduler(1000, stochasticity=2.0, prediction_type="sample")
        made.set_timesteps(timesteps=timesteps)
        x = torch.ones(20_000, 1, 1, 1).double()
        for t in timesteps[:-1]:
            x = made.step(torch.zeros_like(x), t, x, generator=torch.Generator().manual_seed(t), return_dict=False)[0]
        return float(x.mean())

    direct, expected = kept([600, 300]), []
    for t in (torch.tensor([600]), torch.tensor([300])):
        a, s = PATH.signal_and_noise(t, torch.zeros(1))
        expected.append((float(a / s), float(s)))
    (ratio_t, s_t), (ratio_s, s_s) = expected
    assert direct == pytest.approx((ratio_t / ratio_s) ** 2 * s_s / s_t, abs=0.02)
    assert kept([600, 500, 400, 300]) == pytest.approx(direct, abs=0.02)


def test_stochastic_above_leaves_steps_below_to_ddpm():
    made, ddpm = scheduler(4, stochasticity=50.0, stochastic_above=2.0), scheduler(4, stochasticity=1.0)
    x, output = (torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    same = []
    for t in made.timesteps:  # sigma = 1300, 2.4, 1.0, 0.4
        found = [each.step(output, t, x, torch.Generator().manual_seed(2), return_dict=False)[0] for each in (made, ddpm)]
        same.append(torch.allclose(*found, atol=1e-3))
    assert same == [False, False, True, True]


def test_it_is_made_by_name_and_saved_with_its_settings(tmp_path):
    made = make_scheduler("SMDScheduler:stochasticity=3,stochastic_above=2.5", OURS)
    made.save_pretrained(tmp_path)
    loaded = SMDScheduler.from_pretrained(tmp_path)
    assert (loaded.config.stochasticity, loaded.config.stochastic_above) == (3, 2.5)
    assert loaded.config.prediction_type == OURS.config.prediction_type
    assert torch.equal(loaded.alphas_cumprod, OURS.alphas_cumprod)


def test_a_negative_level_is_refused():
    with pytest.raises(ValueError, match="stochastic_above: expected 0 or more, found -1"):
        SMDScheduler(stochastic_above=-1.0)
