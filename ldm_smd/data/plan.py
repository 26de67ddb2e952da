"""What tools/encode.py is to do: which pictures go where, and all that the shards depend on."""

from __future__ import annotations

import hashlib
import json
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
from .index import PictureIndex
from .listings import RemoteTarPart
from .mixing import Mixing
from .settings import EncodeConfig, ImagesConfig
from .shards import FORMAT
from .sources import list_pictures

INDEX = ".index"
"""Folder with the list of the pictures, in the output."""


class MixedPictures(Sequence[Entry]):
    """The pictures of an index in the order in which they go into the shards."""

    def __init__(self, pictures: PictureIndex, mixing: Mixing) -> None:
        self.pictures, self.mixing = pictures, mixing

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, position):
        return self.pictures[self.mixing.pictures(position, position + 1)[0]]


@dataclass(frozen=True)
class Plan:
    """What is to be encoded. ``settings``, all that the shards depend on, go to plan.json: no run continues with others."""

    entries: Sequence[Entry]
    settings: dict
    shard_size: int
    batch_size: int

    @classmethod
    def of(
        cls,
        config: EncodeConfig,
        autoencoder: FrozenAutoencoder,
        clip: ClipEncoder | None = None,
        turn: tuple[int, int] = (0, 1),
    ) -> Plan:
        index = list_pictures(config.images, index_folder(config), turn)
        mixing = Mixing(index.mixed_counts(), config.shuffle_tars, config.shuffle)
        check_cache(index, mixing, config.images)
        settings = {
            "format": FORMAT,
            "pictures": len(index),
            "pictures_sha256": index.pictures_sha256,
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
        return cls(MixedPictures(index, mixing), settings, config.shard_size, config.batch_size)

    @property
    def shards(self) -> range:
        return range(-(-len(self.entries) // self.shard_size))

    def shards_of(self, worker: int, workers: int) -> range:
        """A worker's shards follow each other, so that it reads few parts of the source, and each of them once."""
        count = len(self.shards)
        return self.shards[worker * count // workers : (worker + 1) * count // workers]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def path(self, output: Path, shard: int) -> Path:
        width = max(5, len(str(len(self.shards) - 1)))
        return output / f"latents-{shard:0{width}d}.tar"

    def batches(self, shard: int) -> list[range]:
        """Entries of a shard, a batch at a time. No batch crosses the end: another worker may take the next shard."""
        indices = range(len(self.entries))[shard * self.shard_size : (shard + 1) * self.shard_size]
        return [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]

    def count(self, shard: int) -> int:
        return sum(map(len, self.batches(shard)))


def index_folder(config: EncodeConfig) -> Path:
    """The list of the pictures is kept in the output, for all workers; or where that is in a store, on every machine."""
    if not store.is_remote(config.output):
        return Path(config.output) / INDEX
    return Path(config.images.cache).expanduser() / "index" / hashlib.sha256(config.output.encode()).hexdigest()[:16]


def check_cache(index: PictureIndex, mixing: Mixing, config: ImagesConfig) -> None:
    """Raise UserError unless there is room for the tars that are read at a time: else each picture would fetch its tar."""
    sizes = np.array([part.tar.size or 0 if isinstance(part, RemoteTarPart) else 0 for part in index.parts])
    if not sizes.any():
        return
    most = max(map(len, mixing.groups))
    needed = max(int(sizes[parts].sum()) for parts in mixing.groups) / 1e9
    if needed > config.cache_gigabytes:
        raise UserError(
            f"images.cache_gigabytes: expected {needed:.3g} or more, for the {most} tars that are mixed at a time "
            f"(shuffle_tars), found {config.cache_gigabytes:g}"
        )
