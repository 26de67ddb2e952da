"""Timesteps, noise levels and step arguments of any scheduler."""

import copy
import inspect
import logging

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.schedulers import make_scheduler
from ldm_smd.schedulers.conversion import path_of, predicted_x0
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.schedulers.support import SUPPORTED, warn_once
from ldm_smd.schedulers.timesteps import begin_run, step_options, usable_shift

OURS = build_scheduler(DiffusionConfig())
KARRAS = "DPMSolverMultistepScheduler:use_karras_sigmas=true"
TELEPORT = "TeleportScheduler:scheduler=LMSDiscreteScheduler"


def test_a_run_has_all_steps_or_the_last_fraction_of_them():
    scheduler = make_scheduler("DDIMScheduler", OURS)
    assert begin_run(scheduler, 5).tolist() == [999, 799, 599, 399, 199]
    assert begin_run(scheduler, 5, strength=0.4).tolist() == [399, 199] == begin_run(scheduler, 5, strength=0.41).tolist()
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"num_inference_steps: expected 1 to 1000, found {steps}"):
            begin_run(scheduler, steps)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_shift_divides_the_signal_to_noise_ratio_of_each_timestep(name):
    scheduler = make_scheduler(name, OURS)
    even, shifted = (begin_run(scheduler, 4, shift=shift) for shift in (1.0, 3.0))
    levels = []
    for timesteps in (even, shifted):
        a, s = path_of(scheduler).signal_and_noise(timesteps.long(), timesteps)
        levels.append(a / s)
    assert even.tolist() == [999, 749, 499, 249] and shifted[0] == 999 and len(shifted) == 4
    assert torch.allclose(levels[1][1:], levels[0][1:] / 3, rtol=0.02)
    assert begin_run(scheduler, 4).tolist() == even.tolist()
    assert begin_run(scheduler, 4, strength=0.6, shift=3.0).tolist() == shifted[3:].tolist()  # from t = 600 on


def test_a_shift_of_flow_matching_moves_the_noise_levels_as_its_scheduler_does():
    ours = begin_run(FlowMatchEulerDiscreteScheduler(), 4, shift=3.0)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert torch.allclose(ours, theirs.timesteps)


@pytest.mark.parametrize(
    ("name", "steps", "shift", "message"),
    [
        ("DDIMScheduler", 4, 2.0, "timestep_shift: expected 1 for DDIMScheduler, which takes no timesteps, found 2.0"),
        ("DDPMScheduler", 4, 0.0, "timestep_shift: expected a number above 0, found 0.0"),
    ],
)
def test_shifts_that_a_run_does_not_support(name, steps, shift, message):
    with pytest.raises(ValueError, match=message):
        begin_run(make_scheduler(name, OURS), steps, shift=shift)


@pytest.mark.parametrize("shift", [4.0, 0.25])
@pytest.mark.parametrize("steps", [300, 999, 1000])
def test_many_shifted_steps_have_different_timesteps(steps, shift):
    """Where the shift makes them equal, they are consecutive."""
    timesteps = begin_run(make_scheduler("DDPMScheduler", OURS), steps, shift=shift)
    assert (timesteps.diff() < 0).all() and timesteps[0] <= 999 and timesteps[-1] >= 0


@pytest.mark.parametrize("name", [*SUPPORTED, KARRAS, "GMSScheduler", "SMDScheduler", TELEPORT])
def test_every_scheduler_runs_with_the_shift_of_a_model(name):
    """It is used by the schedulers that can, and by no other."""
    scheduler = make_scheduler(name, OURS)
    shift = usable_shift(scheduler, 4.0)
    begin_run(scheduler, 4, shift=shift)
    if shift == 1.0:
        with pytest.raises(ValueError):
            begin_run(scheduler, 4, shift=4.0)


def test_a_shift_of_the_scheduler_replaces_that_of_the_model():
    scheduler = make_scheduler("FlowMatchEulerDiscreteScheduler:shift=3.0", OURS)
    assert usable_shift(scheduler, 4.0) == 1.0
    assert begin_run(scheduler, 4, shift=usable_shift(scheduler, 4.0)).tolist() == [1000, 900, 750, 500]
    assert usable_shift(make_scheduler("FlowMatchEulerDiscreteScheduler", OURS), 4.0) == 4.0


@pytest.mark.parametrize("steps", [21, 27, 42, 61])
def test_the_rest_of_a_schedule_is_divided_without_rounding_errors(steps):
    scheduler = make_scheduler("TeleportScheduler:scheduler=DPMSolverMultistepScheduler,sigma_skip=2.5", OURS)
    timesteps = begin_run(scheduler, steps)
    assert len(timesteps) == steps and timesteps[0] == len(scheduler.rest.alphas_cumprod) - 1 and timesteps[-1] > 0


def test_a_wrapping_scheduler_has_the_timesteps_and_step_of_the_wrapped_one():
    """All attributes are forwarded except the noise schedule, also by a copy."""
    scheduler = make_scheduler(TELEPORT, OURS)
    kept = len(scheduler.rest.alphas_cumprod)
    assert kept < 1000 == len(scheduler) == len(scheduler.alphas_cumprod)
    timesteps = begin_run(scheduler, 5)
    assert timesteps[0] == kept - 1 and torch.equal(timesteps, scheduler.timesteps) and scheduler.order == 1
    with pytest.raises(ValueError, match=f"num_inference_steps: expected 1 to {kept}, found 900"):
        begin_run(scheduler, 900)
    assert inspect.signature(scheduler.step) == inspect.signature(scheduler.rest.step)
    assert torch.equal(copy.deepcopy(scheduler).timesteps, timesteps) and not hasattr(scheduler, "no_such_thing")
    noise, rest = (path_of(each).signal_and_noise(timesteps, timesteps)[1] for each in (scheduler, scheduler.rest))
    assert torch.equal(noise, rest)


def test_bad_rounding_of_timesteps_by_diffusers_is_refused_or_gives_one_warning(caplog, monkeypatch):
    with pytest.raises(ValueError, match=r"num_inference_steps: expected .* rounded to -1, found 61"):
        begin_run(make_scheduler("UniPCMultistepScheduler", OURS), 61)
    monkeypatch.setattr(logging.getLogger("ldm_smd.schedulers.support"), "propagate", True)
    for name, steps, warned in (("DDIMScheduler", 600, 1), ("DDIMScheduler", 30, 0), ("EulerDiscreteScheduler", 600, 0)):
        warn_once.cache_clear()
        caplog.clear()
        for _ in range(2):
            begin_run(make_scheduler(name, OURS), steps)
        assert len(caplog.records) == warned


def test_predicted_x0_is_finite_if_the_schedule_ends_without_signal():
    """Callbacks receive it at the first step."""
    scheduler = make_scheduler("DDIMScheduler:rescale_betas_zero_snr=true,prediction_type=epsilon", OURS)
    x_t = torch.randn(2, 4, 8, 8)
    assert scheduler.alphas_cumprod[-1] == 0 and path_of(scheduler).signal_and_noise(torch.tensor([999]), x_t)[0] > 0
    assert predicted_x0(scheduler, x_t + 1e-3, x_t, torch.tensor(999)).isfinite().all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predicted_x0_is_exact_for_a_true_prediction(kind):
    scheduler, t = make_scheduler(f"DDIMScheduler:prediction_type={kind}", OURS), torch.tensor(400)
    process, (x0, eps) = DiffusionProcess(OURS.alphas_cumprod), torch.randn(2, 3, 4, 8, 8)
    x_t, prediction = process.noise(x0, eps, t[None]), process.target(x0, eps, t[None], kind)
    with_moments = torch.cat((prediction, torch.ones(3, 8, 8, 8)), dim=1)
    assert torch.allclose(predicted_x0(scheduler, with_moments, x_t, t), x0, atol=1e-3)


def test_step_options_follow_the_signature_of_the_step():
    generator = torch.Generator()
    for name, expected in (
        ("DDPMScheduler", {"generator": generator}),
        ("DPMSolverSinglestepScheduler", {"generator": generator}),
        ("UniPCMultistepScheduler", {}),
        (TELEPORT, {"order": 2}),
    ):
        assert step_options(make_scheduler(name, OURS), generator, 1) == expected
    assert step_options(make_scheduler("LMSDiscreteScheduler", OURS), generator, 9) == {"order": 4}
