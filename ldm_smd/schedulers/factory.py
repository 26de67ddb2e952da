"""A scheduler by the name of its class, with the noise schedule of another."""

from __future__ import annotations

import inspect
from typing import cast

import diffusers
import yaml
from diffusers import ConfigMixin, SchedulerMixin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError, one_line
from .support import EVERYWHERE, REFUSED, SPACINGS, SUPPORTED, check_scheduler, defaults, refused


def scheduler_from(name: str, config: dict, ours: dict[str, type[SchedulerMixin]]) -> SchedulerMixin:
    """Make a scheduler as make_scheduler does, of diffusers or of ``ours``, with the noise schedule in ``config`` and the
    settings that it needs for our models (support.py), but for those that ``name`` chooses."""
    name, _, settings = name.partition(":")
    kind = ours.get(name, getattr(diffusers, name, None))
    if name in REFUSED:
        raise UserError(refused(name, REFUSED[name]))
    if kind is None or not is_scheduler(kind):
        raise UserError(f"scheduler: expected a scheduler class ({', '.join([*SUPPORTED, *ours])}), found {name!r}")
    known = inspect.signature(kind).parameters
    chosen = read_settings(name, settings)
    for option in chosen:
        if option not in known:
            raise UserError(f"scheduler: expected a setting of {name} ({', '.join(known)}), found {option!r}")
    # How another scheduler spaces its steps is no part of the noise schedule.
    config = {key: value for key, value in config.items() if key not in SPACINGS}
    # Of what is given, what this class knows: diffusers would warn of the rest.
    given = {key: value for key, value in (EVERYWHERE | config).items() if key in known}
    try:
        scheduler = kind.from_config(given | defaults(name, chosen), **chosen)
        check_scheduler(scheduler)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        said = str(error)
        raise UserError(said if said.startswith("scheduler: ") else f"scheduler: {name}: {one_line(error)}") from error
    return scheduler


def read_settings(name: str, settings: str) -> dict:
    """setting=value,setting=value as a dictionary."""
    found = settings.split(",") if settings else []
    try:
        if all("=" in setting for setting in found):
            return cast(dict, OmegaConf.to_container(OmegaConf.from_dotlist(found)))
    except (OmegaConfBaseException, yaml.YAMLError):
        pass
    raise UserError(f"scheduler: expected {name}:setting=value,setting=value, found {settings!r}")


def is_scheduler(kind: object) -> bool:
    """Also whether the package is there that it needs: without, diffusers has something else of that name."""
    return isinstance(kind, type) and issubclass(kind, SchedulerMixin) and issubclass(kind, ConfigMixin)
