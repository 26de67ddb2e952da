"""Class numbers of one image set in terms of another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ..errors import UserError, shortened

Label = TypeVar("Label", int, int | None)


def renumbered(labels: Sequence[Label], names: Sequence[str], known: Sequence[str], key: str) -> list[Label]:
    """Return ``labels``, the numbers of classes in ``names``, as the numbers of the same classes in ``known``.

    Sets of images are numbered by the sorted names of their own folders, so a class that is missing in one shifts the others.
    They stay as they are if one of the two has no names but numbers, or if there are as many of other names (n01440764 and
    tench).

    Raises:
        UserError: a class is not in ``known``; ``key`` is the setting to blame.
    """
    numbers = {name: number for number, name in enumerate(known)}
    other_names = len(names) == len(known) and numbers.keys().isdisjoint(names)
    if other_names or has_no_names(names) or has_no_names(known):
        return list(labels)
    found = {names[label] for label in set(labels) if label is not None}
    if unknown := sorted(found - numbers.keys()):
        raise UserError(f"{key}: expected classes among {shortened(', '.join(known))}, found {unknown[0]!r}")
    return [label if label is None else numbers[names[label]] for label in labels]


def has_no_names(names: Sequence[str]) -> bool:
    """Tell whether these are the numbers from 0 on, as in tars without classes.json; also for no classes."""
    return list(names) == [str(number) for number in range(len(names))]
