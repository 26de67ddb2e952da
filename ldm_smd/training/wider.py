"""Classes whose names have several parts, as "noto, flags": every part is a wider class of its own."""

from __future__ import annotations

import numpy as np
import torch

from ..schema import check
from .settings import TrainConfig

SEPARATOR = ", "


def class_names(config: TrainConfig, classes: list[str]) -> list[str]:
    """Return the names of the classes that the model knows: those of the shards, then the wider ones; [] for none."""
    names = classes if config.class_conditional else []
    return [*names, *(name for position in wider_names(config, names) for name in position)]


def wider_labels(config: TrainConfig, classes: list[str]) -> torch.Tensor | None:
    """Return the labels of the wider classes of every class of the shards, (classes, parts); None where the model does not know
    them."""
    names = classes if config.class_conditional else []
    positions = wider_names(config, names)
    if not positions:
        return None
    starts = np.cumsum([len(names), *map(len, positions)])
    rows = [
        [int(start) + position.index(part) for start, position, part in zip(starts, positions, name.split(SEPARATOR))]
        for name in names
    ]
    return torch.tensor(rows)


def wider_names(config: TrainConfig, names: list[str]) -> list[list[str]]:
    """Return the different parts of the names, first parts, second parts and so on; [] where ``wider_labels`` is 0."""
    if config.wider_labels == 0:
        return []
    parts = [name.split(SEPARATOR) for name in names]
    same = len(parts) > 0 and len({len(part) for part in parts}) == 1 and len(parts[0]) > 1
    found = ", ".join(names[:3]) or "no classes"
    check(same, "wider_labels", 'classes with names of as many parts, as "noto, flags", or 0', found)
    return [list(dict.fromkeys(position)) for position in zip(*parts)]
