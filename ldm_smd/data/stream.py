"""LatentStream: latent shards -> batches, as a pure function of (seed, images_seen).

Global position n belongs to epoch n // N and lies at place n % N of that epoch's order: the shards in an order drawn from
(seed, epoch), each shard's samples in an order drawn from the same. A global batch is the next ``batch_size`` positions,
across the end of an epoch where it falls so: no sample is dropped, none is repeated within an epoch, and no shard is too
short. Rank r takes the r-th equal slice of every batch, so all ranks take the same number of steps. There is no other
state: to resume is to start at another ``images_seen``.

Do not pass the loader through ``accelerator.prepare``: it would split the batches a second time.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from .shards import Manifest

LARGEST_LABEL = 2**31


@dataclass
class LatentBatch:
    """One rank's part of a batch: moments float16 (b, 2 or 1, C, h, w), labels int64 (b,), -1 for "none"."""

    moments: torch.Tensor
    labels: torch.Tensor

    def pin_memory(self) -> LatentBatch:
        return LatentBatch(self.moments.pin_memory(), self.labels.pin_memory())

    def rows(self, start: int, stop: int) -> LatentBatch:
        return LatentBatch(self.moments[start:stop], self.labels[start:stop])

    def to(self, device: torch.device) -> LatentBatch:
        return LatentBatch(self.moments.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


class Shard:
    """One tar: where each sample's numbers lie in the memory-mapped file, and the labels."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, mirror: bool) -> None:
        self.shape, self.dtype = shape, dtype
        places: dict[str, dict[str, int]] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isreg():
                        raise ValueError(f"{member.name} is no ordinary file")
                    key, _, extension = member.name.partition(".")
                    if extension in ("moments.npy", "mirror.npy"):
                        sample = places.setdefault(key, {})
                        if extension in sample:
                            raise ValueError(f"{member.name} is in it twice")
                        sample[extension] = member.offset_data + _npy_header(tar, member, shape, dtype)
                    elif extension == "cls":
                        labels[key] = int(tar.extractfile(member).read(32))
                        if abs(labels[key]) > LARGEST_LABEL:
                            raise ValueError(f"{member.name} is {labels[key]}")
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"shards: expected a tar of moments {shape} {dtype}, found {path}: {error}") from error
        self.keys = list(places)
        wanted = ("moments.npy", "mirror.npy") if mirror else ("moments.npy",)
        try:
            self.offsets = np.array([[places[key][name] for name in wanted] for key in self.keys], dtype=np.int64)
        except KeyError as error:
            raise UserError(
                f"mirror: expected shards with mirrored encodings (tools/encode.py mirror=true), found none in {path}"
            ) from error
        self.labels = np.array([labels.get(key, -1) for key in self.keys], dtype=np.int64)
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        end = int(self.offsets.max(initial=0)) + int(np.prod(shape)) * dtype.itemsize
        if end > len(self._bytes):
            raise UserError(f"shards: expected {end} bytes or more in {path}, found {len(self._bytes)} (cut short?)")

    def __len__(self) -> int:
        return len(self.keys)

    def moments(self, indices: Sequence[int]) -> np.ndarray:
        """Of the pictures as they are, (n, ...)."""
        out = np.empty((len(indices), *self.shape), dtype=self.dtype)
        for row, index in enumerate(indices):
            self.read(index, False, out[row])
        return out

    def read(self, index: int, mirrored: bool, out: np.ndarray) -> None:
        start = self.offsets[index, int(mirrored)]
        out[:] = self._bytes[start : start + out.nbytes].view(self.dtype).reshape(self.shape)


class LatentStream(IterableDataset):
    """Batches of one rank, from ``images_seen`` up to ``images_total``.

    Args:
        manifest: the shards.
        batch_size: of all ranks together.
        images_seen, images_total: positions to start at and to end before; the last batch is always whole.
        seed: of the order and of the choice of mirrored encodings.
        mirror: take the mirrored encoding with probability one half.
        rank, world_size: which equal slice of each batch is this process's.
    """

    def __init__(
        self,
        manifest: Manifest,
        batch_size: int,
        images_total: int,
        images_seen: int = 0,
        seed: int = 0,
        mirror: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        if batch_size % world_size:
            raise UserError(f"batch_size: expected a multiple of the {world_size} processes, found {batch_size}")
        self.batch_size, self.images_seen, self.images_total = batch_size, images_seen, images_total
        self.seed, self.mirror, self.rank, self.world_size = seed, mirror, rank, world_size
        shape = tuple(manifest.metadata["moments_shape"])
        dtype = np.dtype(manifest.metadata["dtype"])
        self.shape, self.dtype = shape, dtype
        self.shards = [Shard(manifest.folder / item["name"], shape, dtype, mirror) for item in manifest.shards]
        for shard, item in zip(self.shards, manifest.shards):
            if len(shard) != item["count"]:
                raise UserError(f"shards: expected {item['count']} samples in {item['name']}, found {len(shard)}")
        self.count = sum(map(len, self.shards))
        self._cached_epoch, self._order = -1, (np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=bool))
        classes = len(manifest.classes)
        for shard, item in zip(self.shards, manifest.shards):
            if classes and len(shard) and not 0 <= shard.labels.min() <= shard.labels.max() < classes:
                worst = shard.labels.max() if shard.labels.max() >= classes else shard.labels.min()
                raise UserError(f"shards: expected labels from 0 to {classes - 1}, found {worst} in {item['name']}")

    def __iter__(self) -> Iterator[LatentBatch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        position = self.images_seen + first * self.batch_size
        while position < self.images_total:
            yield self.batch_at(position)
            position += stride * self.batch_size

    def batch_at(self, position: int) -> LatentBatch:
        """This rank's slice of the global batch that begins at ``position``."""
        size = self.batch_size // self.world_size
        moments = np.empty((size, *self.shape), dtype=self.dtype)
        labels = np.empty(size, dtype=np.int64)
        for row, (shard, index, mirrored) in enumerate(self._places(position)):
            shard.read(index, mirrored, moments[row])
            labels[row] = shard.labels[index]
        return LatentBatch(torch.from_numpy(moments), torch.from_numpy(labels))

    def keys_at(self, position: int) -> list[str]:
        """The keys of this rank's slice of the batch that begins at ``position``, for messages."""
        return [shard.keys[index] for shard, index, _ in self._places(position)]

    def _places(self, position: int) -> Iterator[tuple[Shard, int, bool]]:
        """(shard, index in it, whether mirrored) of each sample of this rank's slice."""
        size = self.batch_size // self.world_size
        start = position + self.rank * size
        for place in range(start, start + size):
            epoch, within = divmod(place, self.count)
            order, mirrored = self._epoch(epoch)
            shard, index = order[within]
            yield self.shards[shard], index, mirrored[within]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2) pairs (shard, index) in the order of this epoch, and (N,) whether mirrored."""
        if self._cached_epoch != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            parts = []
            for shard in rng.permutation(len(self.shards)):
                index = rng.permutation(len(self.shards[shard]))
                parts.append(np.stack((np.full_like(index, shard), index), axis=1))
            mirrored = rng.random(self.count) < 0.5 if self.mirror else np.zeros(self.count, dtype=bool)
            self._cached_epoch, self._order = epoch, (np.concatenate(parts), mirrored)
        return self._order


def latent_loader(stream: LatentStream, num_workers: int) -> DataLoader:
    """A loader of whole batches; workers take every n-th batch, so the order does not depend on their number."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _npy_header(tar: tarfile.TarFile, member: tarfile.TarInfo, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Length of an .npy header; raises ValueError unless it says this shape and dtype, and these numbers follow. Never
    unpickles."""
    file = io.BytesIO(tar.extractfile(member).read(min(member.size, 1024)))
    major, minor = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if (major, minor) == (1, 0) else np.lib.format.read_array_header_2_0
    found_shape, fortran, found_dtype = reader(file)
    if found_shape != shape or found_dtype != dtype or fortran:
        raise ValueError(f"{member.name} is {found_shape} {found_dtype}")
    wanted = file.tell() + int(np.prod(shape)) * dtype.itemsize
    if member.size != wanted:
        raise ValueError(f"{member.name} has {member.size} bytes and not {wanted}")
    return file.tell()
