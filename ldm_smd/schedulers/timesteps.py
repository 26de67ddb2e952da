"""Running any scheduler: its timesteps, its first sample and the arguments of its step.

SMDPipeline reads these attributes of a scheduler, in addition to those of diffusers' schedulers:

    rest: the scheduler that takes the steps, if it is another one.
    start_part: name of the pipeline's component that ``start(noise, component, class_labels, generator)`` needs to make the
        first sample. Without it, the first sample is ``noise * init_noise_sigma``.
    step_part: name of the component whose ``predict`` returns ``model_output``. Without it, the denoiser's ``predict`` does.
"""

from __future__ import annotations

import inspect
import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler, SchedulerMixin

from .conversion import is_flow, path_of
from .support import SPACINGS, warn_once

Generators = torch.Generator | list[torch.Generator] | None
"""One for the batch, or one per image."""

FLOORED_STRIDES = ("CogVideoXDDIMScheduler", "DDIMParallelScheduler", "DDIMScheduler", "PNDMScheduler")
"""Schedulers that round the distance between timesteps down."""
SKIPPED_FRACTION = 0.02
"""Warn if the rounding skips more than this fraction of the noise schedule."""


def begin_run(scheduler: SchedulerMixin, steps: int, strength: float | None = None, shift: float = 1.0) -> torch.Tensor:
    """Prepare a scheduler for ``steps`` steps and return its timesteps, on the CPU.

    Args:
        strength: for a run from a noised image, keep only this last fraction of the timesteps.
        shift: shift evenly spaced timesteps to noise: the signal-to-noise ratio of each is divided by ``shift``^2.

    Raises ValueError for a number of steps or a shift that the scheduler does not support.
    """
    solver = getattr(scheduler, "rest", scheduler)
    known = solver.config.num_train_timesteps
    if not 1 <= steps <= known:
        raise ValueError(f"num_inference_steps: expected 1 to {known}, found {steps}")
    if not 0.0 < shift < math.inf:
        raise ValueError(f"timestep_shift: expected a number above 0, found {shift}")
    # On the CPU: schedulers look up their timesteps, which would synchronise with the device in every step.
    if isinstance(solver, FlowMatchEulerDiscreteScheduler):
        # Its own spacing wastes the last step on the smallest noise level.
        levels = [1.0 - done / steps for done in range(steps)]
        solver.set_timesteps(sigmas=[shift * level / (1.0 + (shift - 1.0) * level) for level in levels], device="cpu")
    elif shift == 1.0 and (solver is scheduler or not can_shift(solver)):
        solver.set_timesteps(steps, device="cpu")
    else:  # also for the rest of a schedule, which diffusers divides with a rounding error for some numbers of steps
        solver.set_timesteps(timesteps=shifted_timesteps(solver, steps, shift), device="cpu")
    if float(solver.timesteps.min()) < 0:
        raise ValueError(f"num_inference_steps: expected a number at which no timestep is rounded to -1, found {steps}")
    name = type(solver).__name__
    if name in FLOORED_STRIDES and known % steps / known > SKIPPED_FRACTION:
        warn_once(
            f"scheduler: {name} takes {steps} steps of {known // steps} timesteps, {known // steps * steps} of {known} in all; "
            "EulerDiscreteScheduler is the same solver as DDIMScheduler and covers them all"
        )
    return run_from(solver, 0 if strength is None else steps_before(solver, steps, strength, shift))


def usable_shift(scheduler: SchedulerMixin, shift: float) -> float:
    """Return ``shift``, the default of a model, or 1 for a scheduler with a shift of its own, and, with a warning, for one that
    spaces its timesteps itself."""
    solver = getattr(scheduler, "rest", scheduler)
    if is_flow(solver) and solver.config.get("shift", 1.0) != 1.0:
        return 1.0  # it has a shift of its own
    if shift == 1.0 or can_shift(solver):
        return shift
    name = type(solver).__name__
    warn_once(f"scheduler: {name} spaces its timesteps itself, so the model's timestep_shift={shift:g} is not used")
    return 1.0


def can_shift(scheduler: SchedulerMixin) -> bool:
    """Return whether the steps are spaced in t, and may be given."""
    return takes_timesteps(scheduler) and not has_other_spacing(scheduler)


def has_other_spacing(scheduler: SchedulerMixin) -> bool:
    """Return whether the steps are spaced in noise levels, as by Karras et al., and not in t."""
    return any(scheduler.config.get(spacing) for spacing in SPACINGS)


def takes_timesteps(scheduler: SchedulerMixin) -> bool:
    """Return whether the timesteps of ``begin_run`` can be shifted."""
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    return "timesteps" in parameters or isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def shifted_timesteps(scheduler: SchedulerMixin, steps: int, shift: float) -> list[int]:
    """Return evenly spaced timesteps, from the last one down, shifted to noise; consecutive ones where they would be equal.
    Raises ValueError for schedulers that space their timesteps themselves."""
    if not takes_timesteps(scheduler):
        raise ValueError(
            f"timestep_shift: expected 1 for {type(scheduler).__name__}, which takes no timesteps, found {shift}; "
            "DDPMScheduler, DPMSolverMultistepScheduler and EulerDiscreteScheduler take them"
        )
    known = scheduler.config.num_train_timesteps
    even = (known - torch.arange(steps) * known / steps).round().long() - 1
    shifted, index = path_of(scheduler).shifted(even, shift).round().long(), torch.arange(steps)
    # Strictly decreasing and at least 0 if t_i + i does not increase and is at least that of the last step.
    return ((shifted + index).cummin(0).values.clamp_min(steps - 1) - index).tolist()


def steps_before(scheduler: SchedulerMixin, steps: int, strength: float, shift: float = 1.0) -> int:
    """Return the number of steps to skip when a run starts from an image: all but the last fraction ``strength``. If the steps
    are not evenly spaced in t, skip those before that fraction of the timesteps."""
    if shift == 1.0 and not has_other_spacing(scheduler):
        return steps - max(1, round(steps * strength))
    begins = scheduler.timesteps[:: scheduler.order]
    return int((begins + 1 - strength * scheduler.config.num_train_timesteps).abs().argmin())


def run_from(scheduler: SchedulerMixin, begin: int) -> torch.Tensor:
    """Make the scheduler start with step ``begin`` and return the timesteps from there on."""
    # A step of a second-order scheduler has two timesteps, as diffusers counts them.
    index = begin * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        # Otherwise it looks up its first timestep, and picks the second of two equal ones.
        scheduler.set_begin_index(index)
    timesteps = scheduler.timesteps
    if not isinstance(scheduler, PNDMScheduler) or begin == 0:
        return timesteps[index:]
    if not scheduler.config.skip_prk_steps:
        raise ValueError("image: expected PNDMScheduler with skip_prk_steps=true, found false")
    # Its first step always has two evaluations, so the second timestep is repeated.
    once = torch.cat((timesteps[:1], timesteps[2:]))[begin:]
    return torch.cat((once[:1], once[1:2], once[1:]))


def first_sample(scheduler: SchedulerMixin, noise: torch.Tensor) -> torch.Tensor:
    """Return the first sample of a run, from unit noise."""
    return noise * getattr(scheduler, "init_noise_sigma", 1.0)


def noised(scheduler: SchedulerMixin, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Noise latents (B, C, h, w) to ``timestep``, the first of the run."""
    every = timestep.repeat(len(clean))
    return scheduler.scale_noise(clean, every, noise) if is_flow(scheduler) else scheduler.add_noise(clean, noise, every)


def network_input(scheduler: SchedulerMixin, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Convert a scheduler's sample to x_t = a_t x_0 + s_t eps. Schedulers that work in sigma use another scale."""
    return sample if is_flow(scheduler) else scheduler.scale_model_input(sample, timestep)


def step_options(scheduler: SchedulerMixin, generator: Generators, index: int) -> dict[str, object]:
    """Return the arguments of ``step`` that only some schedulers take, for step number ``index``."""
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, object] = {"generator": generator} if "generator" in accepted else {}
    if "order" in accepted:
        # LMSDiscreteScheduler derives its order from the index among all steps, which is wrong for a run from an image.
        options["order"] = min(index + 1, accepted["order"].default)
    return options
