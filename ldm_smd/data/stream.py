"""LatentStream: latent shards -> batches, as a pure function of (seed, images_seen).

Global position n is position n % N of epoch n // N, whose order is drawn from (seed, epoch): the shards in random order, and
the samples of each in random order. A global batch is the next ``batch_size`` positions, across the end of an epoch if need be:
no sample is dropped, none is repeated within an epoch, and no shard is too short. Rank r takes the r-th equal slice of every
batch, so all ranks take the same number of steps. There is no other state: to resume is to start at another ``images_seen``.

Do not pass the loader through ``accelerator.prepare``: it would split the batches a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from .ahead import FetchedAhead
from .shards import FIELDS, Manifest
from .tar_index import index_tar

KEPT_SHARDS, KEPT_COPIES, KEPT_ORDERS = 64, 4, 8
"""Open at once, by each worker: shards, local copies of shards in a store, which its cache cannot remove until then; orders."""


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
        name = manifest.missing() if rank == 0 or manifest.cache is None else None
        if name is not None:
            raise UserError(f"shards: expected {name} in {manifest.folder}, as its manifest says, found no such file")
        self._shards: dict[int, Shard] = {}
        self._orders: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def __iter__(self) -> Iterator[LatentBatch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        positions = range(self.images_seen + first * self.batch_size, self.images_total, stride * self.batch_size)
        try:
            yield from self.batches_at(positions)
        except UserError as error:
            if worker is None:
                raise
            # LatentLoader raises it: torch would raise a traceback of the worker as its message.
            yield error  # type: ignore[misc]

    def batches_at(self, positions: Iterable[int]) -> Iterator[LatentBatch]:
        """Read this rank's slices of the global batches that begin at these positions, in order; where the shards are in a
        store, they are fetched ahead."""
        if self.manifest.cache is None:
            yield from map(self.batch_at, positions)
            return
        positions = list(positions) if not isinstance(positions, range) else positions
        fetched = FetchedAhead(self._visits(positions), lambda shard: self.manifest.fetch(self.manifest.shards[shard]))
        with fetched.running():
            for position in positions:
                fetched.reached(position)
                yield self.batch_at(position)

    def batch_at(self, position: int) -> LatentBatch:
        """Read this rank's slice of the global batch that begins at ``position``."""
        moments, labels, embeddings = [], [], []
        for number, indices, mirrored in self._runs(position):
            shard = self._shard(number)
            moments.append(shard.moments(indices, mirrored))
            labels.append(shard.labels[indices])
            if self.embeddings:
                embeddings.append(shard.embeddings(indices))
        return LatentBatch(joined(moments), joined(labels), joined(embeddings) if embeddings else None)

    def keys_at(self, position: int) -> list[str]:
        """List the keys of this rank's slice of the batch that begins at ``position``, for messages."""
        return [self._shard(number).keys[index] for number, indices, _ in self._runs(position) for index in indices]

    def _visits(self, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Yield (position, shard) wherever the batches at these positions come to another shard. For a thread of its own."""
        order, before = lru_cache(2)(self._epoch), -1
        for position in positions:
            for _, shard, _, _ in self._parts(position, order):
                if shard != before:
                    yield position, shard
                before = shard

    def _runs(self, position: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Split this rank's slice by shard: yield the shard, the samples' indices in it, and whether mirrored (0 or 1)."""
        for epoch, shard, first, length in self._parts(position, self._order):
            indices, mirrored = (values[first : first + length] for values in self._order(epoch, shard))
            yield shard, indices, mirrored

    def _parts(
        self, position: int, order_of: Callable[[int], tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield the parts of this rank's slice: epoch, shard, the first sample in its order, and how many."""
        size = self.batch_size // self.world_size
        position += self.rank * size
        stop = position + size
        while position < stop:
            epoch, within = divmod(position, self.count)
            order, ends = order_of(epoch)
            slot = int(np.searchsorted(ends, within, side="right"))
            shard, end = int(order[slot]), int(ends[slot])
            first = within - (end - self.counts[shard])
            length = min(stop - position, end - within)
            yield epoch, shard, first, length
            position += length

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
        return order, self.counts[order].cumsum()

    def _order(self, epoch: int, shard: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of an epoch's shards, and the position in the epoch at which each ends; or the order of the samples
        in one shard, and whether each is mirrored."""
        if (epoch, shard) not in self._orders:
            if shard is None:
                found = self._epoch(epoch)
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
            keep_newest(self._shards, number, shard, KEPT_SHARDS if self.manifest.cache is None else KEPT_COPIES)
        return self._shards[number]


def open_shard(manifest: Manifest, item: dict, mirror: bool) -> Shard:
    """Open a shard of the manifest, by the index in its record if that is of this very shard. ``mirror``: it must have mirrored
    encodings."""
    shape, dtype = tuple(manifest.metadata["moments_shape"]), np.dtype(manifest.metadata["dtype"])
    dimensions, record = manifest.embedding_dimensions, manifest.record(item)

    def open_path(path: Path) -> Shard:
        index = record.get("index", {}) if record.get("shard") == item else index_tar(path, shape, dtype, dimensions)
        return Shard(path, shape, dtype, dimensions, index)

    shard = manifest.with_shard(item, open_path)
    if mirror and len(shard) and shard.offsets.shape[1] < len(FIELDS):
        place = manifest.place(item["name"])
        raise UserError(f"mirror: expected shards with mirrored encodings (tools/encode.py mirror=true), found none in {place}")
    return shard


def joined(parts: list[np.ndarray]) -> torch.Tensor:
    """Join along the batch; no copy where there is only one part, as for most batches."""
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def keep_newest(cache: dict, key: object, value: object, count: int) -> None:
    """Add to a cache, and drop the oldest entries beyond ``count``."""
    cache[key] = value
    while len(cache) > count:
        del cache[next(iter(cache))]


class LatentLoader(DataLoader):
    """A DataLoader in whose workers a UserError is that one line, too."""

    def __iter__(self) -> Iterator[LatentBatch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def latent_loader(stream: LatentStream, num_workers: int) -> DataLoader:
    """Make a loader of full batches; workers take every n-th batch, so the order does not depend on their number."""
    return LatentLoader(stream, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available())
