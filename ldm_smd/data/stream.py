"""LatentStream: latent shards -> batches, as a pure function of (seed, images_seen).

Global position n is position n % N of epoch n // N, whose order is drawn from (seed, epoch): the shards in random order, and
the samples of each in random order. A global batch is the next ``batch_size`` positions, across the end of an epoch if need be:
no sample is dropped, none is repeated within an epoch, and no shard is too short. Rank r takes the r-th equal slice of every
batch, so all ranks take the same number of steps. There is no other state: to resume is to start at another ``images_seen``.

Do not pass the loader through ``accelerator.prepare``: it would split the batches a second time.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from .shards import EMBEDDING, FIELDS, Manifest, read_json

HEADER_BYTES, LABEL_BYTES, LARGEST_LABEL = 1024, 32, 2**31
KEPT_SHARDS, KEPT_ORDERS = 64, 8
"""Open at once, by each worker."""


@dataclass
class LatentBatch:
    """One rank's slice of a batch: moments float16 (b, 2 or 1, C, h, w), labels int64 (b,), -1 for "none", and optionally
    OpenCLIP embeddings float16 (b, D)."""

    moments: torch.Tensor
    labels: torch.Tensor
    embeddings: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LatentBatch:
        embeddings = None if self.embeddings is None else function(self.embeddings)
        return LatentBatch(function(self.moments), function(self.labels), embeddings)

    def pin_memory(self) -> LatentBatch:
        return self.map(torch.Tensor.pin_memory)

    def rows(self, start: int, stop: int) -> LatentBatch:
        return self.map(lambda values: values[start:stop])

    def to(self, device: torch.device) -> LatentBatch:
        return self.map(lambda values: values.to(device, non_blocking=True))


class Shard:
    """One tar, memory-mapped: the offset of each sample's values in it, and the labels.

    Args:
        path, shape, dtype: the tar, and what its moments are.
        dimensions: of its embeddings; None where it has none.
        index: as ``index_tar`` returns it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, dimensions: int | None, index: dict) -> None:
        self.shape, self.dtype = shape, dtype
        try:
            self.keys = index["keys"]
            self.labels = np.array(index["labels"], dtype=np.int64).reshape(len(self.keys))
            self.offsets = np.array(index["offsets"], dtype=np.int64).reshape(len(self.keys), -1)
            self.embedding_offsets = np.array(index.get("embeddings", []), dtype=np.int64)
            if dimensions and self.embedding_offsets.shape != (len(self.keys),):
                raise ValueError(f"{len(self.embedding_offsets)} embeddings of {len(self.keys)} samples")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"shards: expected an index of {path.name} in its record, found {error!r}") from error
        self._rows = rows_of(path, self.offsets, int(np.prod(shape)) * dtype.itemsize)
        self._embeddings = rows_of(path, self.embedding_offsets, (dimensions or 1) * dtype.itemsize)

    def __len__(self) -> int:
        return len(self.keys)

    def moments(self, indices: np.ndarray, mirrored: np.ndarray | int = 0) -> np.ndarray:
        """Return (n, 2 or 1, C, h, w), of the mirrored images where ``mirrored`` (n,) is 1."""
        return self._rows[self.offsets[indices, mirrored]].view(self.dtype).reshape(-1, *self.shape)

    def embeddings(self, indices: np.ndarray) -> np.ndarray:
        """Return (n, D)."""
        return self._embeddings[self.embedding_offsets[indices]].view(self.dtype)


def rows_of(path: Path, offsets: np.ndarray, nbytes: int) -> np.ndarray:
    """Map a file so that row i is its ``nbytes`` bytes from the i-th on: copying some rows is one call, as fast as in an array.
    Raises UserError where the offsets lead beyond the file."""
    size, end = path.stat().st_size, int(offsets.max()) + nbytes if offsets.size else 0
    if end > size or offsets.min(initial=0) < 0:
        raise UserError(f"shards: expected {end} bytes or more in {path}, found {size} (cut short?)")
    data = np.memmap(path, dtype=np.uint8, mode="r") if end else np.empty(nbytes, np.uint8)
    return sliding_window_view(data, nbytes)


class LatentStream(IterableDataset):
    """Batches of one rank, from ``images_seen`` up to ``images_total``.

    Args:
        manifest: the shards.
        batch_size: images of all ranks together.
        images_seen, images_total: positions to start at and to end before; the last batch is always full.
        seed: determines the order and the choice of mirrored encodings.
        mirror: take the mirrored encoding with probability one half.
        embeddings: also take the embeddings, which the shards must have.
        rank, world_size: this process and their number: it takes the slice ``rank`` of ``world_size`` equal ones.
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
        embeddings: bool = False,
    ) -> None:
        super().__init__()
        if embeddings and manifest.embedding is None:
            raise UserError(f"shards: expected embeddings (tools/encode.py embedding=...), found none in {manifest.folder}")
        self.embeddings = embeddings
        if batch_size % world_size:
            raise UserError(f"batch_size: expected a multiple of the {world_size} processes, found {batch_size}")
        self.batch_size, self.images_seen, self.images_total = batch_size, images_seen, images_total
        self.seed, self.mirror, self.rank, self.world_size = seed, mirror, rank, world_size
        self.manifest, self.count = manifest, manifest.count
        self.counts = np.array([item["count"] for item in manifest.shards])
        for name in (item["name"] for item in manifest.shards):
            if not (manifest.folder / name).is_file():
                raise UserError(f"shards: expected {name} in {manifest.folder}, as its manifest says, found no such file")
        self._shards: dict[int, Shard] = {}
        self._orders: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def __iter__(self) -> Iterator[LatentBatch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for position in range(self.images_seen + first * self.batch_size, self.images_total, stride * self.batch_size):
            yield self.batch_at(position)

    def batch_at(self, position: int) -> LatentBatch:
        """Read this rank's slice of the global batch that begins at ``position``."""
        parts = list(self._runs(position))
        moments = [shard.moments(indices, mirrored) for shard, indices, mirrored in parts]
        labels = [shard.labels[indices] for shard, indices, _ in parts]
        embeddings = [shard.embeddings(indices) for shard, indices, _ in parts] if self.embeddings else None
        return LatentBatch(joined(moments), joined(labels), joined(embeddings) if embeddings else None)

    def keys_at(self, position: int) -> list[str]:
        """List the keys of this rank's slice of the batch that begins at ``position``, for messages."""
        return [shard.keys[index] for shard, indices, _ in self._runs(position) for index in indices]

    def _runs(self, position: int) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Split this rank's slice by shard: yield the shard, the samples' indices in it, and whether mirrored (0 or 1)."""
        size = self.batch_size // self.world_size
        position += self.rank * size
        stop = position + size
        while position < stop:
            epoch, within = divmod(position, self.count)
            order, ends = self._order(epoch)
            slot = int(np.searchsorted(ends, within, side="right"))
            shard, end = int(order[slot]), int(ends[slot])
            first = within - (end - self.counts[shard])
            length = min(stop - position, end - within)
            indices, mirrored = (values[first : first + length] for values in self._order(epoch, shard))
            yield self._shard(shard), indices, mirrored
            position += length

    def _order(self, epoch: int, shard: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of an epoch's shards, and the position in the epoch at which each ends; or the order of the samples
        in one shard, and whether each is mirrored."""
        if (epoch, shard) not in self._orders:
            if shard is None:
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
                found = order, self.counts[order].cumsum()
            else:
                rng = np.random.default_rng((self.seed, epoch, shard))
                order = rng.permutation(self.counts[shard])
                found = order, (rng.random(len(order)) < 0.5 if self.mirror else np.zeros(len(order))).astype(int)
            keep_newest(self._orders, (epoch, shard), found, KEPT_ORDERS)
        return self._orders[epoch, shard]

    def _shard(self, number: int) -> Shard:
        """Return a shard, opened and checked when it is first read."""
        if number not in self._shards:
            item, classes = self.manifest.shards[number], len(self.manifest.classes)
            shard = open_shard(self.manifest, item, self.mirror)
            if len(shard) != item["count"]:
                raise UserError(f"shards: expected {item['count']} samples in {item['name']}, found {len(shard)}")
            if classes and not 0 <= shard.labels.min() <= shard.labels.max() < classes:
                worst = shard.labels.max() if shard.labels.max() >= classes else shard.labels.min()
                raise UserError(f"shards: expected labels from 0 to {classes - 1}, found {worst} in {item['name']}")
            keep_newest(self._shards, number, shard, KEPT_SHARDS)
        return self._shards[number]


def open_shard(manifest: Manifest, item: dict, mirror: bool) -> Shard:
    """Open a shard of the manifest, by the index in its record if that is of this very shard. ``mirror``: it must have mirrored
    encodings."""
    path, shape = manifest.folder / item["name"], tuple(manifest.metadata["moments_shape"])
    dtype, dimensions = np.dtype(manifest.metadata["dtype"]), manifest.embedding_dimensions
    record = read_json(path.with_suffix(".json"))
    index = record.get("index", {}) if record.get("shard") == item else index_tar(path, shape, dtype, dimensions)
    shard = Shard(path, shape, dtype, dimensions, index)
    if mirror and len(shard) and shard.offsets.shape[1] < len(FIELDS):
        raise UserError(f"mirror: expected shards with mirrored encodings (tools/encode.py mirror=true), found none in {path}")
    return shard


def index_tar(path: Path, shape: tuple[int, ...], dtype: np.dtype, dimensions: int | None = None) -> dict:
    """Return the keys of a shard in order, their labels (-1 for none), and the offsets at which the values of each of FIELDS
    begin; with ``dimensions`` also those of the embeddings.

    Reads every header, which takes 0.1 ms a sample: tools/encode.py does it once and leaves it in the shard's record.
    Raises UserError for anything but a tar of samples of this shape and dtype, once each.
    """
    shapes = dict.fromkeys(FIELDS, shape) | ({EMBEDDING: (dimensions,)} if dimensions else {})
    offsets: dict[str, dict[str, int]] = {name: {} for name in shapes}
    headers: dict[str, dict[bytes, int]] = {name: {} for name in shapes}
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    raise ValueError(f"{member.name} is no ordinary file")
                key, _, name = member.name.partition(".")
                if name in shapes:
                    if key in offsets[name]:
                        raise ValueError(f"{member.name} is in it twice")
                    header = npy_header(read_at(file, member, HEADER_BYTES), member, shapes[name], dtype, headers[name])
                    offsets[name][key] = member.offset_data + header
                elif name == "cls":
                    labels[key] = int(read_at(file, member, LABEL_BYTES))
                    if abs(labels[key]) > LARGEST_LABEL:
                        raise ValueError(f"{member.name} is {labels[key]}")
        moments, mirrored = (offsets[name] for name in FIELDS)
        for name, found in offsets.items():
            if found.keys() != moments.keys() and (found or found is not mirrored):
                raise ValueError(f"{len(found)} {name} of {len(moments)} samples")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shards: expected a tar of moments {shape} {dtype}, found {path}: {error}") from error
    views = [moments, mirrored] if mirrored else [moments]
    index = {
        "keys": list(moments),
        "labels": [labels.get(key, -1) for key in moments],
        "offsets": [[view[key] for view in views] for key in moments],
    }
    return index | ({"embeddings": [offsets[EMBEDDING][key] for key in moments]} if dimensions else {})


def read_at(file: BinaryIO, member: tarfile.TarInfo, most: int) -> bytes:
    """Read the first bytes of a member; the file's position stays."""
    position = file.tell()
    file.seek(member.offset_data)
    data = file.read(min(member.size, most))
    file.seek(position)
    return data


def npy_header(data: bytes, member: tarfile.TarInfo, shape: tuple[int, ...], dtype: np.dtype, known: dict[bytes, int]) -> int:
    """Return the length of an .npy header; raise ValueError unless it says this shape and dtype, and as many values follow.
    Never unpickles. ``known``: headers that were good, and their lengths."""
    length = next((length for header, length in known.items() if data.startswith(header)), None)
    if length is None:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found_shape, fortran, found_dtype = reader(file)
        if found_shape != shape or found_dtype != dtype or fortran:
            raise ValueError(f"{member.name} is {found_shape} {found_dtype}")
        length = known[data[: file.tell()]] = file.tell()
    wanted = length + int(np.prod(shape)) * dtype.itemsize
    if member.size != wanted:
        raise ValueError(f"{member.name} has {member.size} bytes and not {wanted}")
    return length


def joined(parts: list[np.ndarray]) -> torch.Tensor:
    """Join along the batch; no copy where there is only one part, as for most batches."""
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def keep_newest(cache: dict, key: object, value: object, count: int) -> None:
    """Add to a cache, and drop the oldest entries beyond ``count``."""
    cache[key] = value
    while len(cache) > count:
        del cache[next(iter(cache))]


def latent_loader(stream: LatentStream, num_workers: int) -> DataLoader:
    """Make a loader of full batches; workers take every n-th batch, so the order does not depend on their number."""
    return DataLoader(stream, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available())
