"""A scheduler by the name of its class, with the noise schedule of another."""

from __future__ import annotations

import inspect
from typing import cast

import diffusers
from diffusers import SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from omegaconf import OmegaConf

from ..errors import UserError


def scheduler_from(name: str, config: dict, ours: dict[str, type[SchedulerMixin]]) -> SchedulerMixin:
    """The scheduler class called ``name``, of diffusers or of ``ours``, with the noise schedule of a scheduler's ``config``.

    ``name`` may go on with settings of the class: DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++,solver_order=2.
    """
    name, _, settings = name.partition(":")
    kind = ours.get(name, getattr(diffusers, name, None))
    if kind is None or not is_scheduler(kind):
        theirs = (each.name for each in KarrasDiffusionSchedulers)
        near = ", ".join(sorted({*ours, *(each for each in theirs if is_scheduler(getattr(diffusers, each)))}))
        raise UserError(f"scheduler: expected a scheduler class ({near}), found {name!r}")
    options = cast(dict, OmegaConf.to_container(OmegaConf.from_dotlist(settings.split(",")))) if settings else {}
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise UserError(f"scheduler: expected a setting of {name} ({', '.join(known)}), found {option!r}")
    # Of what is given, what this class knows: diffusers would warn of the rest.
    scheduler = kind.from_config({name: value for name, value in config.items() if name in known}, **options)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"scheduler: expected one of the noise schedule that models are trained on (alphas_cumprod), found {name}"
        )
    return scheduler


def is_scheduler(kind: object) -> bool:
    """Also whether the package is there that it needs: without, diffusers has something else of that name."""
    return isinstance(kind, type) and issubclass(kind, SchedulerMixin)
