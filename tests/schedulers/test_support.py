"""Supported schedulers of diffusers sample a known distribution. The others are refused."""

import inspect
import logging

import diffusers
import pytest
import torch

from ldm_smd.config import settings
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.errors import UserError
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.schedulers import make_scheduler
from ldm_smd.schedulers.conversion import prediction_conversions, process_of
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.schedulers.support import REFUSED, SUPPORTED, check_scheduler, warn_once
from ldm_smd.schedulers.timesteps import begin_run, first_sample, network_input, noised, run_from

OURS = build_scheduler(DiffusionConfig())
MEAN, DEVIATION = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([1.0, 0.5, 0.7])
CHOSEN = [
    "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++",
    "DPMSolverMultistepScheduler:use_karras_sigmas=true",
    "EulerDiscreteScheduler:use_exponential_sigmas=true",
    "HeunDiscreteScheduler:use_exponential_sigmas=true",
    "UniPCMultistepScheduler:use_karras_sigmas=true",
]
"""Schedulers with settings of the user."""


def standard(count, seed):
    """Return draws (count, 3) with sample mean 0 and sample standard deviation 1."""
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return (noise - noise.mean(dim=0)) / noise.std(dim=0)


def perfect_network(x_t, t):
    """Predict v for independent x_0 ~ N(MEAN, DEVIATION^2). Between timesteps log(sigma) is linear, as in diffusers."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(1)
    known = OURS.alphas_cumprod.double().logit()
    alphabar = torch.lerp(known[t.floor().long()], known[t.ceil().long()], t.frac()).sigmoid()
    process, only = DiffusionProcess(alphabar.float()), torch.zeros(1, dtype=torch.long)
    a, s = process.signal_and_noise(only, x_t)
    x0 = MEAN + a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2) * (x_t - a * MEAN)
    return process.target(x0, (x_t - a * x0) / s, only, "v_prediction")


def sample(scheduler, x, timesteps):
    """Sample like SMDPipeline, with a network that was trained on the process of OURS."""
    conversions = prediction_conversions(process_of(OURS), process_of(scheduler), timesteps, x.device)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(1)} if "generator" in accepted else {}
    for index, (t, conversion) in enumerate(zip(timesteps, conversions)):
        if "order" in accepted:
            options["order"] = min(index + 1, 4)
        x_t = network_input(scheduler, x, t)
        prediction = conversion.to_scheduler(perfect_network(*conversion.network_inputs(x_t)), x_t)
        x = scheduler.step(prediction, t, x, **options).prev_sample
    return x


def assert_is_the_data(x, tolerance):
    assert (x.mean(dim=0) - MEAN).abs().max() < tolerance, x.mean(dim=0)
    assert (x.std(dim=0) / DEVIATION - 1.0).abs().max() < tolerance, x.std(dim=0) / DEVIATION


@pytest.mark.parametrize("name", [*SUPPORTED, *CHOSEN])
def test_noise_becomes_the_data(name):
    scheduler = make_scheduler(name, OURS)
    timesteps = begin_run(scheduler, 50)
    assert_is_the_data(sample(scheduler, first_sample(scheduler, standard(4000, 0)), timesteps), 0.06)


@pytest.mark.parametrize("name", [*SUPPORTED, *CHOSEN])
def test_a_noised_image_becomes_the_data(name):
    scheduler = make_scheduler(name, OURS)
    scheduler.set_timesteps(50)
    timesteps = run_from(scheduler, 30)
    start = noised(scheduler, MEAN + DEVIATION * standard(4000, 2), standard(4000, 3), timesteps[0])
    assert_is_the_data(sample(scheduler, start, timesteps), 0.06)


@pytest.mark.parametrize("name", [name for name, settings in SUPPORTED.items() if "use_karras_sigmas" in settings])
def test_first_steps_are_short_in_sigma_unless_the_user_chooses_otherwise(name):
    """Even timesteps would go from sigma = 1,300 to 13 in one step."""
    scheduler = make_scheduler(name, OURS)
    scheduler.set_timesteps(20)
    noise = standard(4000, 0) * scheduler.init_noise_sigma
    assert scheduler.sigmas[2] > 0.4 * scheduler.sigmas[0]
    assert_is_the_data(sample(scheduler, noise, run_from(scheduler, 0)), 0.25)
    for spacing in ("use_exponential_sigmas", "use_beta_sigmas"):
        config = make_scheduler(f"{name}:{spacing}=true", OURS).config
        assert config[spacing] and not config.use_karras_sigmas
    assert not make_scheduler(f"{name}:use_karras_sigmas=false", OURS).config.use_karras_sigmas


def test_schedulers_for_distilled_networks_lose_variance():
    """They are refused because they use the mean of x_0 as a sample."""
    scheduler = diffusers.LCMScheduler.from_config(OURS.config)
    scheduler.set_timesteps(50)
    x = sample(scheduler, standard(4000, 0), scheduler.timesteps)
    assert (x.std(dim=0) / DEVIATION < 0.8).all()


def test_every_scheduler_of_diffusers_is_supported_or_refused():
    exported = {name for name in dir(diffusers) if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type)}
    assert exported == SUPPORTED.keys() | REFUSED.keys() and not SUPPORTED.keys() & REFUSED.keys()


def test_the_help_lists_the_supported_schedulers():
    [text] = [setting.text for setting in settings(SampleConfig) if setting.name == "scheduler"]
    named = " ".join(text.split()).split(":")[1].split(", each followed")[0].replace(" or ", ", ").split(",")
    names = {f"{' '.join(name.split())}Scheduler" for name in named}
    assert names == SUPPORTED.keys() | {"GMSScheduler", "SMDScheduler", "TeleportScheduler"}


@pytest.mark.parametrize("name", REFUSED)
def test_other_schedulers_are_refused_with_a_reason(name):
    with pytest.raises(UserError) as error:
        make_scheduler(name, OURS)
    message = str(error.value)
    assert message.startswith("scheduler: expected a scheduler with a noise schedule")
    assert message.endswith(f"found {name}: {REFUSED[name]}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (diffusers.FlowMatchLCMScheduler(), "FlowMatchLCMScheduler: it needs a network distilled"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "with use_dynamic_shifting: only flow"),
        (diffusers.DDIMScheduler(prediction_type="flow_prediction"), "with flow_prediction: only flow matching along"),
        (
            diffusers.EulerDiscreteScheduler(timestep_type="continuous"),
            "with timestep_type=continuous: networks",
        ),
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler: it has its own noise schedule"),
        (diffusers.LCMScheduler.from_config(OURS.config), "LCMScheduler: it needs a network distilled"),
        (
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
            "with use_flow_sigmas: only flow matching along straight lines",
        ),
        (type("Mine", (diffusers.DDIMInverseScheduler,), {})(), "Mine: it inverts sampling"),
        (object(), "object: it has neither"),
    ],
)
def test_unsupported_scheduler_objects_are_refused(scheduler, message):
    expected = "scheduler: expected a scheduler with a noise schedule .*, such as DDIMScheduler.*, found .*" + message
    with pytest.raises(ValueError, match=expected):
        check_scheduler(scheduler)


def warnings_of(caplog, monkeypatch, call, *arguments):
    monkeypatch.setattr(logging.getLogger("ldm_smd.schedulers.support"), "propagate", True)
    warn_once.cache_clear()
    caplog.clear()
    for _ in range(2):
        call(*arguments)
    return [record.message for record in caplog.records]


def test_a_missing_setting_gives_one_warning(caplog, monkeypatch):
    even = diffusers.HeunDiscreteScheduler.from_config(OURS.config)
    [message] = warnings_of(caplog, monkeypatch, check_scheduler, even)
    expected = "scheduler: expected HeunDiscreteScheduler with use_karras_sigmas=True, as make_scheduler sets it, found False"
    assert message == expected
    for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler:use_exponential_sigmas=true", "PNDMScheduler"):
        assert not warnings_of(caplog, monkeypatch, check_scheduler, make_scheduler(name, OURS))


def test_a_scheduler_made_from_another_takes_only_its_noise_schedule():
    """Clipping stays off, and the spacing of sigmas is the default of the class."""
    between = make_scheduler("UniPCMultistepScheduler:use_karras_sigmas=true", OURS)
    ddim, deis = (make_scheduler(name, between) for name in ("DDIMScheduler", "DEISMultistepScheduler"))
    assert not ddim.config.clip_sample and ddim.config.timestep_spacing == "trailing" and not deis.config.use_karras_sigmas
    assert torch.equal(ddim.alphas_cumprod, OURS.alphas_cumprod) and ddim.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "DPMSolverMultistepScheduler:algorithm_type=nonsense",
            "scheduler: DPMSolverMultistepScheduler: nonsense is not",
        ),
        ("HeunDiscreteScheduler:use_karras_sigmas=true,use_beta_sigmas=true", "scheduler: HeunDiscreteScheduler: Only one of"),
        ("UniPCMultistepScheduler:use_flow_sigmas=true", "with use_flow_sigmas: only flow matching along straight lines"),
        ("TeleportScheduler:scheduler=FlowMatchEulerDiscreteScheduler", "expected one with a noise schedule to continue with"),
        ("DDIMScheduler:prediction_type=[", "scheduler: expected DDIMScheduler:setting=value,setting=value, found"),
        ("DDIMScheduler:thresholding", "scheduler: expected DDIMScheduler:setting=value,setting=value, found 'thresholding'"),
        ("SchedulerMixin", "scheduler: expected a scheduler class"),
        ("GMSScheduler:num_moments=4", "scheduler: GMSScheduler: num_moments: expected 2 or 3"),
        ("SMDScheduler:stochasticity=-1", "scheduler: SMDScheduler: stochasticity: expected 0 or more, found -1"),
        ("TeleportScheduler:scheduler=LCMScheduler", "found LCMScheduler: it needs a network distilled"),
    ],
)
def test_wrong_settings_give_one_line(name, message):
    with pytest.raises(UserError) as error:
        make_scheduler(name, OURS)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_of_a_scheduler_are_applied():
    name = "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++,thresholding=true,solver_order=1"
    scheduler = make_scheduler(name, OURS)
    chosen = (scheduler.config.algorithm_type, scheduler.config.thresholding, scheduler.config.solver_order)
    assert chosen == ("sde-dpmsolver++", True, 1)
    assert torch.equal(scheduler.alphas_cumprod, OURS.alphas_cumprod)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01}
    chosen = make_scheduler("DDIMScheduler:" + ",".join(f"{name}={value}" for name, value in betas.items()), OURS)
    assert torch.equal(chosen.alphas_cumprod, diffusers.DDIMScheduler(**betas).alphas_cumprod)
    with pytest.raises(UserError, match=r"expected DDIMScheduler with num_train_timesteps=1000, .*, found 500"):
        make_scheduler("DDIMScheduler:num_train_timesteps=500", OURS)
    with pytest.raises(UserError, match=r"scheduler: expected a scheduler class \(DDIM.*GMSScheduler"):
        make_scheduler("UNet2DModel", OURS)
    with pytest.raises(UserError, match=r"scheduler: expected a setting of DDIMScheduler .*found 'solver_order'"):
        make_scheduler("DDIMScheduler:solver_order=2", OURS)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverMultistepScheduler", "SASolverScheduler"])
def test_a_learned_variance_is_left_out(name):
    """Denoisers do not predict it here. A DiT does, and its DDPM scheduler expects it."""
    learned = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="without a learned variance, as make_scheduler makes it, found DDPMScheduler with"):
        check_scheduler(learned)
    scheduler = make_scheduler(name, learned)
    scheduler.set_timesteps(2)
    x = torch.randn(1, 4, 2, 2)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.shape == x.shape


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_network_that_predicts_x0_is_sampled_by_every_scheduler(name):
    trained = diffusers.DDPMScheduler(prediction_type="sample")
    scheduler = make_scheduler(name, trained)
    timesteps = begin_run(scheduler, 2)
    conversion, *_ = prediction_conversions(process_of(trained), process_of(scheduler), timesteps, torch.device("cpu"))
    x = first_sample(scheduler, torch.randn(1, 4, 2, 2))
    prediction = conversion.to_scheduler(torch.zeros_like(x), network_input(scheduler, x, timesteps[0]))
    options = {"order": 1} if "order" in inspect.signature(scheduler.step).parameters else {}
    assert scheduler.step(prediction, timesteps[0], x, **options).prev_sample.isfinite().all()


def test_defaults_of_diffusers_are_no_settings_of_the_model():
    """They clip pixels to [-1, 1], and begin to sample below the last timestep."""
    for name in ("DDPMScheduler", "DPMSolverMultistepScheduler"):
        config = make_scheduler(name, diffusers.DDIMScheduler()).config
        assert config.timestep_spacing == "trailing" and not config.get("clip_sample")
    chosen = make_scheduler("DDPMScheduler", diffusers.DDIMScheduler(timestep_spacing="linspace", clip_sample=True)).config
    assert chosen.timestep_spacing == "linspace" and chosen.clip_sample
