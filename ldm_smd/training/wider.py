"""Classes whose names have several parts, as "noto, flags": every part is a wider class of its own."""

from __future__ import annotations

import numpy as np
import torch

from ..data.shards import Manifest
from ..schema import check
from .settings import TrainConfig

SEPARATOR = ", "


def class_names(config: TrainConfig, manifest: Manifest) -> list[str]:
    """Return the names of the classes that the model knows: those of the shards, then the wider ones; [] for none."""
    names = labelled(config, manifest)
    return names + [name for position in wider_names(config, names) for name in position]


def wider_labels(config: TrainConfig, manifest: Manifest) -> torch.Tensor | None:
    """Return the labels of the wider classes of every class, (classes, parts); None where the model does not know them."""
    names = labelled(config, manifest)
    positions = wider_names(config, names)
    if not positions:
        return None
    starts = np.cumsum([len(names), *map(len, positions)])
    return torch.tensor(
        [
            [int(start) + position.index(part) for start, position, part in zip(starts, positions, name.split(SEPARATOR))]
            for name in names
        ]
    )


def labelled(config: TrainConfig, manifest: Manifest) -> list[str]:
    """Return the names of the classes of the shards, [] where the model is not to know them."""
    return list(manifest.classes) if config.class_conditional else []


def wider_names(config: TrainConfig, names: list[str]) -> list[list[str]]:
    """Return the different parts of the names, first parts, second parts and so on; [] where ``wider_labels`` is 0."""
    if config.wider_labels == 0:
        return []
    parts = [name.split(SEPARATOR) for name in names]
    same = len(parts) > 0 and len({len(part) for part in parts}) == 1 and len(parts[0]) > 1
    check(
        same,
        "wider_labels",
        'classes with names of as many parts, as "noto, flags", or 0',
        ", ".join(names[:3]) or "no classes",
    )
    return [list(dict.fromkeys(position)) for position in zip(*parts)]
