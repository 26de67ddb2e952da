"""Former names of arguments, accepted with a FutureWarning. Those of settings: ``schema.Settings.RENAMED``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Result = TypeVar("Result")


def current_arguments(given: Mapping[str, Any], renamed: Mapping[str, str], stacklevel: int = 3) -> dict[str, Any]:
    """Return keyword arguments under their current names. ``renamed``: former name -> current name."""
    for former in renamed.keys() & given.keys():
        if renamed[former] in given:
            raise TypeError(f"{renamed[former]}: expected one value, found its former name {former} too")
        warnings.warn(f"{former} is deprecated, use {renamed[former]}", FutureWarning, stacklevel=stacklevel)
    return {renamed.get(name, name): value for name, value in given.items()}


def accept_former_names(renamed: Mapping[str, str]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorate a function whose keyword arguments had other names."""

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Result:
            return function(*args, **current_arguments(given, renamed))

        return call

    return decorate
