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
    """One rank's part of a batch: moments float16 (b, 2 or 1, C, h, w), labels int64 (b,), -1 for "none", and where asked for
    OpenCLIP embeddings float16 (b, D)."""

    moments: torch.Tensor
    labels: torch.Tensor
    embeddings: torch.Tensor | None = None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LatentBatch:
        embeddings = None if self.embeddings is None else function(self.embeddings)
        return LatentBatch(function(self.moments), function(self.labels), embeddings)

    def pin_memory(self) -> LatentBatch:
        return self.each(torch.Tensor.pin_memory)

    def rows(self, start: int, stop: int) -> LatentBatch:
        return self.each(lambda values: values[start:stop])

    def to(self, device: torch.device) -> LatentBatch:
        return self.each(lambda values: values.to(device, non_blocking=True))


class Shard:
    """One tar, memory-mapped: where each sample's numbers lie in it, and the labels.

    Args:
        path, shape, dtype: the tar, and what its moments are.
        dimensions: of its embeddings; None where it has none.
        index: of ``index_tar``.
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
        """(n, 2 or 1, C, h, w), of the mirrored pictures where ``mirrored`` (n,) is 1."""
        return self._rows[self.offsets[indices, mirrored]].view(self.dtype).reshape(-1, *self.shape)

    def embeddings(self, indices: np.ndarray) -> np.ndarray:
        """(n, D)"""
        return self._embeddings[self.embedding_offsets[indices]].view(self.dtype)


def rows_of(path: Path, offsets: np.ndarray, nbytes: int) -> np.ndarray:
    """Row i is the file's ``nbytes`` bytes from the i-th on: a copy of some rows is one call, as fast as of a plain array.
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
        batch_size: of all ranks together.
        images_seen, images_total: positions to start at and to end before; the last batch is always whole.
        seed: of the order and of the choice of mirrored encodings.
        mirror: take the mirrored encoding with probability one half.
        embeddings: also take the embeddings, which the shards must have.
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
        for item in manifest.shards:
            if not (manifest.folder / item["name"]).is_file():
                raise UserError(
                    f"shards: expected {item['name']} in {manifest.folder}, as its manifest says, found no such file"
                )
        self._shards: dict[int, Shard] = {}
        self._orders: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def __iter__(self) -> Iterator[LatentBatch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        position = self.images_seen + first * self.batch_size
        while position < self.images_total:
            yield self.batch_at(position)
            position += stride * self.batch_size

    def batch_at(self, position: int) -> LatentBatch:
        """This rank's slice of the global batch that begins at ``position``."""
        parts = list(self._places(position))
        moments = [shard.moments(indices, mirrored) for shard, indices, mirrored in parts]
        labels = [shard.labels[indices] for shard, indices, _ in parts]
        embeddings = [shard.embeddings(indices) for shard, indices, _ in parts] if self.embeddings else None
        return LatentBatch(joined(moments), joined(labels), joined(embeddings) if embeddings else None)

    def keys_at(self, position: int) -> list[str]:
        """The keys of this rank's slice of the batch that begins at ``position``, for messages."""
        return [shard.keys[index] for shard, indices, _ in self._places(position) for index in indices]

    def _places(self, position: int) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """This rank's slice in runs of one shard: the shard, the samples' indices in it, and whether mirrored (0 or 1)."""
        size = self.batch_size // self.world_size
        place = position + self.rank * size
        stop = place + size
        while place < stop:
            epoch, within = divmod(place, self.count)
            order, ends = self._order(epoch)
            slot = int(np.searchsorted(ends, within, side="right"))
            shard, end = int(order[slot]), int(ends[slot])
            first = within - (end - self.counts[shard])
            length = min(stop - place, end - within)
            indices, mirrored = (values[first : first + length] for values in self._order(epoch, shard))
            yield self._shard(shard), indices, mirrored
            place += length

    def _order(self, epoch: int, shard: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Of an epoch: the order of the shards, and the place in the epoch at which each ends. Of a shard in it: the order of
        its samples, and whether each is mirrored."""
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
        """Opened and checked when it is first read."""
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
    """A shard of the manifest, by the index in its record where that is of this very shard; with ``mirror`` the mirrored
    encodings must be there."""
    path, shape = manifest.folder / item["name"], tuple(manifest.metadata["moments_shape"])
    dtype = np.dtype(manifest.metadata["dtype"])
    dimensions = manifest.embedding_dimensions
    record = read_json(path.with_suffix(".json"))
    known = record.get("shard") == item
    index = record.get("index", {}) if known else index_tar(path, shape, dtype, dimensions)
    shard = Shard(path, shape, dtype, dimensions, index)
    if mirror and len(shard) and shard.offsets.shape[1] < len(FIELDS):
        raise UserError(f"mirror: expected shards with mirrored encodings (tools/encode.py mirror=true), found none in {path}")
    return shard


def index_tar(path: Path, shape: tuple[int, ...], dtype: np.dtype, dimensions: int | None = None) -> dict:
    """The keys of a shard in order, their labels (-1 for none), and where in the file the numbers of each of FIELDS begin; with
    ``dimensions`` also those of the embeddings.

    Reads every header, which takes 0.1 ms a sample: tools/encode.py does it once and leaves it in the shard's record.
    Raises UserError for anything but a tar of samples of these numbers, once each.
    """
    places: dict[str, dict[str, int]] = {}
    labels: dict[str, int] = {}
    embeddings: dict[str, int] = {}
    headers: dict[bytes, int] = {}
    embedding_headers: dict[bytes, int] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    raise ValueError(f"{member.name} is no ordinary file")
                key, _, extension = member.name.partition(".")
                if extension in FIELDS:
                    sample = places.setdefault(key, {})
                    if extension in sample:
                        raise ValueError(f"{member.name} is in it twice")
                    header = npy_header(read_at(file, member, HEADER_BYTES), member, shape, dtype, headers)
                    sample[extension] = member.offset_data + header
                elif extension == EMBEDDING and dimensions:
                    if key in embeddings:
                        raise ValueError(f"{member.name} is in it twice")
                    data = read_at(file, member, HEADER_BYTES)
                    header = npy_header(data, member, (dimensions,), dtype, embedding_headers)
                    embeddings[key] = member.offset_data + header
                elif extension == "cls":
                    labels[key] = int(read_at(file, member, LABEL_BYTES))
                    if abs(labels[key]) > LARGEST_LABEL:
                        raise ValueError(f"{member.name} is {labels[key]}")
        kinds = {frozenset(sample) for sample in places.values()}
        if len(kinds) > 1 or any(FIELDS[0] not in kind for kind in kinds):
            raise ValueError(f"of its samples some have {' and some '.join(' and '.join(sorted(kind)) for kind in kinds)}")
        if dimensions and embeddings.keys() != places.keys():
            raise ValueError(f"{len(embeddings)} embeddings of {len(places)} samples")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shards: expected a tar of moments {shape} {dtype}, found {path}: {error}") from error
    offsets = [[sample[name] for name in FIELDS if name in sample] for sample in places.values()]
    index = {"keys": list(places), "labels": [labels.get(key, -1) for key in places], "offsets": offsets}
    return index | ({"embeddings": [embeddings[key] for key in places]} if dimensions else {})


def read_at(file: BinaryIO, member: tarfile.TarInfo, most: int) -> bytes:
    """The first bytes of a member; the place of the file stays."""
    place = file.tell()
    file.seek(member.offset_data)
    data = file.read(min(member.size, most))
    file.seek(place)
    return data


def npy_header(data: bytes, member: tarfile.TarInfo, shape: tuple[int, ...], dtype: np.dtype, known: dict[bytes, int]) -> int:
    """Length of an .npy header; raises ValueError unless it says this shape and dtype, and these numbers follow. Never
    unpickles. ``known``: headers that were good, and their lengths."""
    length = next((length for header, length in known.items() if data.startswith(header)), None)
    if length is None:
        file = io.BytesIO(data)
        major, minor = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if (major, minor) == (1, 0) else np.lib.format.read_array_header_2_0
        found_shape, fortran, found_dtype = reader(file)
        if found_shape != shape or found_dtype != dtype or fortran:
            raise ValueError(f"{member.name} is {found_shape} {found_dtype}")
        length = known[data[: file.tell()]] = file.tell()
    wanted = length + int(np.prod(shape)) * dtype.itemsize
    if member.size != wanted:
        raise ValueError(f"{member.name} has {member.size} bytes and not {wanted}")
    return length


def joined(parts: list[np.ndarray]) -> torch.Tensor:
    """One after the other; no copy where there is only one, as for most batches."""
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def keep_newest(cache: dict, key: object, value: object, count: int) -> None:
    """Add to a cache, and drop what has been in it longest beyond ``count``."""
    cache[key] = value
    while len(cache) > count:
        del cache[next(iter(cache))]


def latent_loader(stream: LatentStream, num_workers: int) -> DataLoader:
    """A loader of whole batches; workers take every n-th batch, so the order does not depend on their number."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
