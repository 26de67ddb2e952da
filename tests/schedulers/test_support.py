"""What the supported schedulers of diffusers make of noise where the answer is known, and that the others are refused."""

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
"""Settings of the user's own."""


def standard(count, seed):
    """Draws (count, 3) whose mean and standard deviation are 0 and 1 as they are."""
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return (noise - noise.mean(dim=0)) / noise.std(dim=0)


def perfect_network(x_t, t):
    """v for x_0 ~ N(MEAN, DEVIATION^2), number by number; between two timesteps log(sigma) is linear, as diffusers has it."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(1)
    known = OURS.alphas_cumprod.double().logit()
    alphabar = torch.lerp(known[t.floor().long()], known[t.ceil().long()], t.frac()).sigmoid()
    process, only = DiffusionProcess(alphabar.float()), torch.zeros(1, dtype=torch.long)
    a, s = process.signal_and_noise(only, x_t)
    x0 = MEAN + a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2) * (x_t - a * MEAN)
    return process.target(x0, (x_t - a * x0) / s, only, "v_prediction")


def walk(scheduler, x, timesteps):
    """As SMDPipeline does, with a network that was trained on the process of OURS."""
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
    assert_is_the_data(walk(scheduler, first_sample(scheduler, standard(4000, 0)), timesteps), 0.06)


@pytest.mark.parametrize("name", [*SUPPORTED, *CHOSEN])
def test_a_noised_picture_becomes_the_data(name):
    scheduler = make_scheduler(name, OURS)
    scheduler.set_timesteps(50)
    timesteps = run_from(scheduler, 30)
    start = noised(scheduler, MEAN + DEVIATION * standard(4000, 2), standard(4000, 3), timesteps[0])
    assert_is_the_data(walk(scheduler, start, timesteps), 0.06)


@pytest.mark.parametrize("name", [name for name, settings in SUPPORTED.items() if "use_karras_sigmas" in settings])
def test_steps_are_not_even_in_t_where_that_is_too_long(name):
    """From sigma = 1,300 to 13 in one step; what remains is right at 20 steps, and what the user wants comes first."""
    scheduler = make_scheduler(name, OURS)
    scheduler.set_timesteps(20)
    noise = standard(4000, 0) * scheduler.init_noise_sigma
    assert scheduler.sigmas[2] > 0.4 * scheduler.sigmas[0]
    assert_is_the_data(walk(scheduler, noise, run_from(scheduler, 0)), 0.25)
    for spacing in ("use_exponential_sigmas", "use_beta_sigmas"):
        config = make_scheduler(f"{name}:{spacing}=true", OURS).config
        assert config[spacing] and not config.use_karras_sigmas
    assert not make_scheduler(f"{name}:use_karras_sigmas=false", OURS).config.use_karras_sigmas


def test_why_those_for_distilled_networks_are_refused():
    """They take the mean of x_0 for a sample: of its standard deviation much is lost."""
    scheduler = diffusers.LCMScheduler.from_config(OURS.config)
    scheduler.set_timesteps(50)
    x = walk(scheduler, standard(4000, 0), scheduler.timesteps)
    assert (x.std(dim=0) / DEVIATION < 0.8).all()


def test_every_scheduler_of_diffusers_is_supported_or_refused():
    exported = {name for name in dir(diffusers) if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type)}
    assert exported == SUPPORTED.keys() | REFUSED.keys() and not SUPPORTED.keys() & REFUSED.keys()


def test_the_help_names_the_supported_ones():
    [text] = [setting.text for setting in settings(SampleConfig) if setting.name == "scheduler"]
    named = " ".join(text.split()).split(":")[1].split(", each followed")[0].replace(" or ", ", ").split(",")
    names = {f"{' '.join(name.split())}Scheduler" for name in named}
    assert names == SUPPORTED.keys() | {"GMSScheduler", "TeleportScheduler"}


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_a_reason(name):
    with pytest.raises(UserError) as error:
        make_scheduler(name, OURS)
    said = str(error.value)
    assert said.startswith("scheduler: expected a scheduler with a noise schedule")
    assert said.endswith(f"found {name}: {REFUSED[name]}")
    assert "\n" not in said


@pytest.mark.parametrize(
    "scheduler, said",
    [
        (diffusers.FlowMatchLCMScheduler(), "FlowMatchLCMScheduler: it needs a network distilled"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "with use_dynamic_shifting: only flow"),
        (diffusers.DDIMScheduler(prediction_type="flow_prediction"), "with flow_prediction: only flow matching along"),
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
def test_one_made_in_python_is_refused(scheduler, said):
    with pytest.raises(
        ValueError, match="scheduler: expected a scheduler with a noise schedule .*, such as DDIMScheduler.*, found .*" + said
    ):
        check_scheduler(scheduler)


def warnings_of(caplog, monkeypatch, call, *arguments):
    monkeypatch.setattr(logging.getLogger("ldm_smd.schedulers.support"), "propagate", True)
    warn_once.cache_clear()
    caplog.clear()
    for _ in range(2):
        call(*arguments)
    return [record.message for record in caplog.records]


def test_settings_that_are_missing_are_warned_of_once(caplog, monkeypatch):
    even = diffusers.HeunDiscreteScheduler.from_config(OURS.config)
    [said] = warnings_of(caplog, monkeypatch, check_scheduler, even)
    expected = "scheduler: expected HeunDiscreteScheduler with use_karras_sigmas=True, as make_scheduler sets it, found False"
    assert said == expected
    for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler:use_exponential_sigmas=true", "PNDMScheduler"):
        assert not warnings_of(caplog, monkeypatch, check_scheduler, make_scheduler(name, OURS))


def test_settings_do_not_follow_from_one_scheduler_to_another():
    """The noise schedule does; clipping, which these do not know, stays off, and spacing of sigmas is of the class."""
    between = make_scheduler("UniPCMultistepScheduler:use_karras_sigmas=true", OURS)
    ddim, deis = (make_scheduler(name, between) for name in ("DDIMScheduler", "DEISMultistepScheduler"))
    assert not ddim.config.clip_sample and ddim.config.timestep_spacing == "trailing" and not deis.config.use_karras_sigmas
    assert torch.equal(ddim.alphas_cumprod, OURS.alphas_cumprod) and ddim.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "name, said",
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
        ("TeleportScheduler:scheduler=LCMScheduler", "found LCMScheduler: it needs a network distilled"),
    ],
)
def test_wrong_settings_are_one_line(name, said):
    with pytest.raises(UserError) as error:
        make_scheduler(name, OURS)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_scheduler_takes_settings():
    name = "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++,thresholding=true,solver_order=1"
    scheduler = make_scheduler(name, OURS)
    chosen = (scheduler.config.algorithm_type, scheduler.config.thresholding, scheduler.config.solver_order)
    assert chosen == ("sde-dpmsolver++", True, 1)
    assert torch.equal(scheduler.alphas_cumprod, OURS.alphas_cumprod)
    with pytest.raises(UserError, match=r"scheduler: expected a scheduler class \(DDIM.*GMSScheduler"):
        make_scheduler("UNet2DModel", OURS)
    with pytest.raises(UserError, match=r"scheduler: expected a setting of DDIMScheduler .*found 'solver_order'"):
        make_scheduler("DDIMScheduler:solver_order=2", OURS)
