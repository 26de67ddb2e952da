"""Coarse classes: the parts of class names such as "noto, flags"."""

from __future__ import annotations

import numpy as np
import torch

from ..schema import check
from .settings import TrainConfig

SEPARATOR = ", "


def class_names(config: TrainConfig, classes: list[str]) -> list[str]:
    """Return the names of the model's classes: those of the shards, then the coarse ones; [] for an unconditional model."""
    names = classes if config.class_conditional else []
    return [*names, *(name for position in coarse_names(config, names) for name in position)]


def coarse_labels(config: TrainConfig, classes: list[str]) -> torch.Tensor | None:
    """Return the labels of the coarse classes of every class of the shards, (classes, parts); None without coarse classes."""
    names = classes if config.class_conditional else []
    positions = coarse_names(config, names)
    if not positions:
        return None
    starts = np.cumsum([len(names), *map(len, positions)])
    rows = [
        [int(start) + position.index(part) for start, position, part in zip(starts, positions, name.split(SEPARATOR))]
        for name in names
    ]
    return torch.tensor(rows)


def coarse_names(config: TrainConfig, names: list[str]) -> list[list[str]]:
    """Return the distinct first parts of the names, second parts, and so on; [] if ``coarse_label_fraction`` is 0."""
    if config.coarse_label_fraction == 0:
        return []
    parts = [name.split(SEPARATOR) for name in names]
    same = len(parts) > 0 and len({len(part) for part in parts}) == 1 and len(parts[0]) > 1
    found = ", ".join(names[:3]) or "no classes"
    check(
        same, "coarse_label_fraction", 'class names that all have the same number of parts, such as "noto, flags", or 0', found
    )
    return [list(dict.fromkeys(position)) for position in zip(*parts)]
