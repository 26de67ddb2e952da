"""The plan of an encoding run: which images go into which shard, and all settings that the shards depend on."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..autoencoder import FrozenAutoencoder
from ..errors import UserError
from ..models.clip import ClipEncoder
from . import store
from .entries import Entry
from .index import ImageIndex
from .listings import RemoteTarPart
from .order import ImageOrder
from .settings import EncodeConfig, ImagesConfig
from .shards import FORMAT
from .sources import list_images

INDEX = ".index"
"""Folder of the image index, in the output."""


class OrderedImages(Sequence[Entry]):
    """The images of an index, in the order in which they go into the shards."""

    def __init__(self, index: ImageIndex, order: ImageOrder) -> None:
        self.images, self.order = index, order

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position):
        return self.images[self.order.images(position, position + 1)[0]]


@dataclass(frozen=True)
class Plan:
    """Which images are encoded, and how.

    Attributes:
        entries: images in the order of the shards.
        settings: all that the shards depend on. Saved as plan.json; a run with other settings cannot continue this one.
        shard_size, batch_size: numbers of images.
    """

    entries: Sequence[Entry]
    settings: dict
    shard_size: int
    batch_size: int

    @classmethod
    def from_config(
        cls,
        config: EncodeConfig,
        autoencoder: FrozenAutoencoder,
        clip: ClipEncoder | None = None,
        worker: tuple[int, int] = (0, 1),
    ) -> Plan:
        index = list_images(config.images, index_folder(config), worker)
        order = ImageOrder(index.shuffle_unit_counts(), config.shuffle_tars, config.shuffle)
        check_cache_size(index, order, config.images)
        if worker[0] == 0:
            report_unlabelled(index)
        settings = {
            "format": FORMAT,
            "pictures": len(index),
            "pictures_sha256": index.images_sha256,
            "files_sha256": index.files_sha256(config.compare_contents),
            "autoencoder": {"source": autoencoder.name, **autoencoder.identity()},
            "resolution": config.images.resolution,
            "crop": config.images.crop,
            "background": config.images.background,
            "mirror": config.mirror,
            "shuffle_tars": config.shuffle_tars if config.shuffle else 0,
            "shard_size": config.shard_size,
            "batch_size": config.batch_size,
            "device": autoencoder.device.type,
            "classes": index.classes,
            "versions": {name: version(name) for name in ("torch", "diffusers", "pillow", "webdataset")},
        }
        if clip is not None:
            settings["embedding"] = clip.identity()
        return cls(OrderedImages(index, order), settings, config.shard_size, config.batch_size)

    @property
    def shards(self) -> range:
        return range(-(-len(self.entries) // self.shard_size))

    def shards_of(self, worker: int, workers: int) -> range:
        """Return the shards of a worker. They are consecutive, so that it reads few parts of the source, each of them once."""
        count = len(self.shards)
        return self.shards[worker * count // workers : (worker + 1) * count // workers]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def path(self, output: Path, shard: int) -> Path:
        width = max(5, len(str(len(self.shards) - 1)))
        return output / f"latents-{shard:0{width}d}.tar"

    def batches(self, shard: int) -> list[range]:
        """Return the positions of a shard's images, in batches. No batch crosses the end, as another worker may go on there."""
        indices = range(len(self.entries))[shard * self.shard_size : (shard + 1) * self.shard_size]
        return [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]

    def count(self, shard: int) -> int:
        return sum(map(len, self.batches(shard)))


def index_folder(config: EncodeConfig) -> Path:
    """Return the folder of the image index: in the output, shared by all workers, or on each machine if that is in a store."""
    if not store.is_remote(config.output):
        return Path(config.output) / INDEX
    return Path(config.images.cache).expanduser() / "index" / hashlib.sha256(config.output.encode()).hexdigest()[:16]


def report_unlabelled(index: ImageIndex) -> None:
    """Say on stderr how many images have no class, if others have one. A stray file beside the folders of classes is one."""
    count, first = index.unlabelled() if index.classes else (0, None)
    if first is not None:
        print(f"{count} of {len(index)} images have no class, first {first.name}: they train without a label", file=sys.stderr)


def check_cache_size(index: ImageIndex, order: ImageOrder, config: ImagesConfig) -> None:
    """Raise UserError unless the cache holds all tars of a group. Otherwise each image could fetch its tar again."""
    sizes = np.array([part.tar.size or 0 if isinstance(part, RemoteTarPart) else 0 for part in index.parts])
    if not sizes.any():
        return
    group_size = max(map(len, order.groups))
    needed = max(int(sizes[parts].sum()) for parts in order.groups) / 1e9
    if needed > config.cache_gigabytes:
        tars = f"the {group_size} tars that are shuffled together (shuffle_tars)" if group_size > 1 else "the largest tar"
        raise UserError(f"images.cache_gigabytes: expected {needed:.3g} or more, for {tars}, found {config.cache_gigabytes:g}")
