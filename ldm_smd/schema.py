"""Field types of settings, with the checks of their values.

Does not import OmegaConf, because the networks import names of choices from the settings of their package.
"""

from __future__ import annotations

import math
import typing
from dataclasses import Field, dataclass, field, fields

from .errors import UserError, shortened

MISSING: typing.Any = "???"
"""OmegaConf's marker of a required value."""
PRECISIONS = ("auto", "no", "bf16")
LONGEST_NAME = 4096
MAX_IMAGES = 10**12
MAX_SEED = 2**32 - 1
"""Largest seed that both NumPy's and torch's generators accept."""


def check(condition: bool, key: str, expected: str, found: object) -> None:
    """Raise UserError "key: expected ..., found ..." unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}: expected {expected}, found {shortened(repr(found))}")


@dataclass(frozen=True)
class Bounds:
    """Range of a number, or of every number in a list: ``minimum`` and ``maximum`` are allowed values, ``above`` and ``below``
    are not. A list has at least ``min_length`` entries."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    min_length: int = 0

    def __contains__(self, value: float) -> bool:
        """Tell whether a value is in the range; NaN never is."""
        return (
            not math.isnan(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.above is None and self.below is None and self.maximum != math.inf:
            return f"from {self.minimum:,} to {self.maximum:,}"
        low = f"at least {self.minimum:,}" if self.above is None else f"above {self.above:,}"
        if self.below is not None:
            return f"{low}, below {self.below:,}"
        return low if self.maximum == math.inf else f"{low}, at most {self.maximum:,}"


def number(default: typing.Any, minimum: float | None = None, maximum: float | None = None, **others: typing.Any) -> typing.Any:
    """Make a field for a number, or a list of numbers, within ``Bounds(minimum, maximum, **others)``."""
    metadata = {"bounds": Bounds(minimum, maximum, **others)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(default: str, allowed: tuple[str, ...]) -> typing.Any:
    """Make a field that takes one of these names. Shells complete them."""
    return field(default=default, metadata={"choices": allowed})


def check_field(item: Field, key: str, value: typing.Any) -> None:
    """Raise UserError unless the field allows ``value``; ``key`` is its full name."""
    if value is None or value == MISSING:
        return
    entries = value if isinstance(value, list) else [value]
    if isinstance(value, list):
        check(not any(isinstance(entry, (list, dict)) for entry in value), key, "a list of plain values", value)
    if any(isinstance(entry, str) for entry in entries):
        for entry in entries:
            fits = 0 < len(entry) <= LONGEST_NAME and "\0" not in entry
            check(fits, key, f"text of 1 to {LONGEST_NAME:,} characters", entry)
        if "choices" in item.metadata:
            check(value in item.metadata["choices"], key, "one of " + ", ".join(item.metadata["choices"]), value)
    bounds = item.metadata.get("bounds")
    if bounds is not None:
        check(len(entries) >= bounds.min_length, key, f"a list of {bounds.min_length} or more numbers", value)
        for entry in entries:
            check(isinstance(entry, (int, float)) and entry in bounds, key, f"a number {bounds}", entry)


@dataclass
class Settings:
    """Base class of all schemas. Every field is checked when an instance is made."""

    RENAMED: typing.ClassVar[dict[str, str]] = {}
    """Former name -> current name. Files and command lines may use both; a former name gives a warning."""

    def __post_init__(self) -> None:
        for item in fields(self):
            check_field(item, item.name, getattr(self, item.name))
