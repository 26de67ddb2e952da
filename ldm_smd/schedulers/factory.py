"""Makes a scheduler by class name, with the noise schedule of another one."""

from __future__ import annotations

import inspect
from typing import Any, cast

import diffusers
import yaml
from diffusers import ConfigMixin, SchedulerMixin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..deprecation import current_arguments
from ..diffusion.settings import DiffusionConfig
from ..errors import UserError, one_line
from .schedule import build_scheduler
from .support import (
    EVERYWHERE,
    REFUSED,
    SPACINGS,
    SUPPORTED,
    WITHOUT_SAMPLE_PREDICTION,
    check_scheduler,
    defaults,
    refused,
    without_learned_variance,
)


def scheduler_from(name: str, config: dict, custom: dict[str, type[SchedulerMixin]]) -> SchedulerMixin:
    """Make a scheduler as make_scheduler does, with the noise schedule in ``config``.

    Args:
        name: class name in diffusers or in ``custom``, with optional settings. They override the settings that the class needs
            for our models (support.py).
        custom: classes of this package by name.
    """
    name, _, settings = name.partition(":")
    cls = custom.get(name, getattr(diffusers, name, None))
    if name in REFUSED:
        raise UserError(refused(name, REFUSED[name]))
    # If a scheduler's dependency is missing, diffusers exports a placeholder under its name.
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin) and issubclass(cls, ConfigMixin)):
        raise UserError(f"scheduler: expected a scheduler class ({', '.join([*SUPPORTED, *custom])}), found {name!r}")
    known = inspect.signature(cls).parameters
    chosen = current_arguments(read_settings(name, settings), getattr(cls, "RENAMED", {}))
    for option in chosen:
        if option not in known:
            raise UserError(f"scheduler: expected a setting of {name} ({', '.join(known)}), found {option!r}")
    # Step spacing is not part of the noise schedule. diffusers would warn of settings that the class does not have.
    # A class default of diffusers is no setting of the model, if the configuration says that it is one.
    unset = EVERYWHERE.keys() & set(config.get("_use_default_values", ()))
    own = {key: value for key, value in without_learned_variance(config).items() if key not in {*SPACINGS, *unset}}
    config = EVERYWHERE | own
    if config.get("prediction_type") == "sample" and name in WITHOUT_SAMPLE_PREDICTION:
        config["prediction_type"] = "v_prediction"
    if "trained_betas" in known and not {"beta_schedule", "trained_betas"} & config.keys():  # of a flow matching scheduler
        config |= build_scheduler(DiffusionConfig()).config
    given = {key: value for key, value in config.items() if key in known}
    if {"beta_start", "beta_end", "beta_schedule"} & chosen.keys():
        given.pop("trained_betas", None)  # diffusers prefers them to the settings of a schedule
    try:
        scheduler = cast(Any, cls).from_config(given | defaults(name, chosen), **chosen)
        check_scheduler(scheduler)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        said = str(error)
        raise UserError(said if said.startswith("scheduler: ") else f"scheduler: {name}: {one_line(error)}") from error
    return scheduler


def read_settings(name: str, settings: str) -> dict:
    """Parse setting=value,setting=value."""
    found = settings.split(",") if settings else []
    try:
        if all("=" in setting for setting in found):
            return cast(dict, OmegaConf.to_container(OmegaConf.from_dotlist(found)))
    except (OmegaConfBaseException, yaml.YAMLError):
        pass
    raise UserError(f"scheduler: expected {name}:setting=value,setting=value, found {settings!r}")
