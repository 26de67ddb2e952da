"""A run of any scheduler: its timesteps, where its sample begins, and what its step takes.

SMDPipeline asks a scheduler for these attributes beside those that diffusers' schedulers have:

    rest: the scheduler that takes the steps, if it is another one.
    start_part: the name of the pipeline's component with which ``start(noise, component, class_labels, generator)`` makes the
        first sample; without it that is ``noise * init_noise_sigma``.
    step_part: the name of the component whose ``predict`` returns ``model_output``; without it the denoiser's ``predict`` does.
"""

from __future__ import annotations

import inspect

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler, SchedulerMixin

from .conversion import is_flow
from .support import SPACINGS, warn_once

Generators = torch.Generator | list[torch.Generator] | None
"""One for a batch, or one for each image."""

WHOLE_STRIDES = ("CogVideoXDDIMScheduler", "DDIMParallelScheduler", "DDIMScheduler", "PNDMScheduler")
"""Schedulers that round the distance between two timesteps down."""
LOST = 0.02
"""Warn where that leaves out a larger fraction of the noise schedule."""


def begin_run(scheduler: SchedulerMixin, steps: int, strength: float | None = None) -> torch.Tensor:
    """Set a scheduler to a run of so many steps and return its timesteps, on the CPU; with ``strength`` only the last, that
    fraction of them, for a run from a noised image. Raises ValueError for a number of steps that the scheduler cannot take."""
    solver = getattr(scheduler, "rest", scheduler)
    known = solver.config.num_train_timesteps
    if not 1 <= steps <= known:
        raise ValueError(f"num_inference_steps: expected 1 to {known}, found {steps}")
    # On the CPU: schedulers look their timesteps up, and the host would wait for the device in every step.
    if isinstance(solver, FlowMatchEulerDiscreteScheduler):
        # Its own spacing ends with a step from the least noise of all, which is of no use.
        solver.set_timesteps(sigmas=[1.0 - done / steps for done in range(steps)], device="cpu")
    else:
        solver.set_timesteps(steps, device="cpu")
    if int(solver.timesteps.min()) < 0:
        raise ValueError(f"num_inference_steps: expected a number at which no timestep is rounded to -1, found {steps}")
    name = type(solver).__name__
    if name in WHOLE_STRIDES and known % steps / known > LOST:
        warn_once(
            f"scheduler: {name} steps by {known // steps} timesteps, which {steps} times is {known // steps * steps} and not "
            f"{known}; EulerDiscreteScheduler is the same solver as DDIMScheduler, without that error"
        )
    return run_from(solver, 0 if strength is None else steps_before(solver, steps, strength))


def steps_before(scheduler: SchedulerMixin, steps: int, strength: float) -> int:
    """Count the steps that are left out where a run begins with an image: all but the fraction ``strength``; where steps are
    not even in t, those before that fraction of the timesteps."""
    if not any(scheduler.config.get(spacing) for spacing in SPACINGS):
        return steps - max(1, round(steps * strength))
    begins = scheduler.timesteps[:: scheduler.order]
    return int((begins + 1 - strength * scheduler.config.num_train_timesteps).abs().argmin())


def run_from(scheduler: SchedulerMixin, begin: int) -> torch.Tensor:
    """Set the scheduler to begin with step ``begin`` and return the timesteps from there on."""
    # A step of a second-order scheduler has two timesteps, as diffusers counts them.
    index = begin * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        # Otherwise it looks its first timestep up, and takes the second of two that are equal.
        scheduler.set_begin_index(index)
    timesteps = scheduler.timesteps
    if not isinstance(scheduler, PNDMScheduler) or begin == 0:
        return timesteps[index:]
    if not scheduler.config.skip_prk_steps:
        raise ValueError(
            "image: expected PNDMScheduler with skip_prk_steps, whose first steps can be left out, found it without"
        )
    # Its first step, wherever that is, has two evaluations: the second timestep comes twice.
    once = torch.cat((timesteps[:1], timesteps[2:]))[begin:]
    return torch.cat((once[:1], once[1:2], once[1:]))


def first_sample(scheduler: SchedulerMixin, noise: torch.Tensor) -> torch.Tensor:
    """Return the sample that a run begins with, of unit noise."""
    return noise * getattr(scheduler, "init_noise_sigma", 1.0)


def noised(scheduler: SchedulerMixin, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return the sample at one timestep, the first of the run, that is made of these latents (B, C, h, w)."""
    every = timestep.repeat(len(clean))
    return scheduler.scale_noise(clean, every, noise) if is_flow(scheduler) else scheduler.add_noise(clean, noise, every)


def network_input(scheduler: SchedulerMixin, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return x_t = a_t x_0 + s_t eps of a scheduler's sample, which those that work in sigma keep in another scale."""
    return sample if is_flow(scheduler) else scheduler.scale_model_input(sample, timestep)


def step_options(scheduler: SchedulerMixin, generator: Generators, index: int) -> dict[str, object]:
    """Return the arguments of step number ``index`` in which schedulers differ."""
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, object] = {"generator": generator} if "generator" in accepted else {}
    if "order" in accepted:
        # LMSDiscreteScheduler takes the index among all steps for the number of steps done, also from an image.
        options["order"] = min(index + 1, accepted["order"].default)
    return options
