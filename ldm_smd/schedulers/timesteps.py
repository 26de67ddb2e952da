"""A run of any scheduler: its timesteps and their noise, what its step takes, and x_0 at a step.

SMDPipeline asks a scheduler for these attributes beside those that diffusers' schedulers have:

    rest: the scheduler that takes the steps, if it is another one.
    start_part: the name of the pipeline's component with which ``start(noise, component, class_labels, generator)`` makes the
        first sample; without it that is ``noise * init_noise_sigma``.
    step_part: the name of the component whose ``predict`` returns ``model_output``; without it the denoiser's ``predict`` does.
"""

from __future__ import annotations

import inspect

import torch
from diffusers import PNDMScheduler, SchedulerMixin

from ..diffusion.process import LEAST_ALPHABAR, DiffusionProcess
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
    known = len(solver.alphas_cumprod)
    if not 1 <= steps <= known:
        raise ValueError(f"num_inference_steps: expected 1 to {known}, found {steps}")
    # On the CPU: schedulers look their timesteps up, and the host would wait for the device in every step.
    solver.set_timesteps(steps, device="cpu")
    if int(solver.timesteps.min()) < 0:
        raise ValueError(f"num_inference_steps: expected a number at which no timestep is rounded to -1, found {steps}")
    name, known = type(solver).__name__, solver.config.num_train_timesteps
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


def path_of(scheduler: SchedulerMixin) -> DiffusionProcess:
    """Return the process that a scheduler reverses, on the CPU; one that ends without signal ends with next to none."""
    return DiffusionProcess(scheduler.alphas_cumprod.cpu().clamp_min(LEAST_ALPHABAR))


def predicted_x0(
    scheduler: SchedulerMixin, prediction: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Compute x_0 (B, C, h, w) from a prediction at one timestep, whose channels after the first C are not read."""
    path, mean = path_of(scheduler).to(x_t.device), prediction[:, : x_t.shape[1]]
    return path.to_x0(mean, x_t, timestep[None].to(x_t.device), scheduler.config.prediction_type).to(x_t.dtype)


def step_options(scheduler: SchedulerMixin, generator: Generators, index: int) -> dict[str, object]:
    """Return the arguments of step number ``index`` in which schedulers differ."""
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, object] = {"generator": generator} if "generator" in accepted else {}
    if "order" in accepted:
        # LMSDiscreteScheduler takes the index among all steps for the number of steps done, also from an image.
        options["order"] = min(index + 1, accepted["order"].default)
    return options
