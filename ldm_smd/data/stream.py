"""LatentStream: latent shards -> batches, as a pure function of (seed, images_seen).

Position n of the stream is position n % N of epoch n // N, for N samples. The order of an epoch is drawn from (seed, epoch):
the shards in random order, and the samples of each shard in random order. A global batch is the next ``batch_size`` positions
and may cross the end of an epoch. No sample is dropped or repeated within an epoch, and shards may have any length. Every batch
is split into equal slices, and rank r takes the r-th, so all ranks take the same number of steps. There is no other state: a
run resumes by starting at another ``images_seen``.

Do not pass the loader through ``accelerator.prepare``, which would split the batches a second time.
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
from .ahead import Prefetcher
from .shards import FIELDS, Manifest
from .tar_index import index_tar
from .workers import end_by_own_process, signals_blocked

MAX_OPEN_SHARDS, MAX_OPEN_COPIES, MAX_ORDERS = 64, 4, 8
"""Kept by each worker: open shards; open local copies of shards in a store, whose disk space is freed only when they are
closed; orders."""


@dataclass
class LatentBatch:
    """One rank's slice of a batch.

    Attributes:
        moments: float16, (b, 2 or 1, C, h, w).
        labels: int64, (b,); -1 for no label.
        embeddings: OpenCLIP embeddings, float16, (b, D), or None.
    """

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
    """A memory-mapped tar, with the offset and label of each sample.

    Args:
        shape, dtype: shape and type of the moments of one sample.
        dimensions: size of an embedding; None if there are none.
        index: as returned by ``index_tar``.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, dimensions: int | None, index: dict) -> None:
        self.shape, self.dtype = shape, dtype
        try:
            self.keys = index["keys"]
            self.labels = np.array(index["labels"], dtype=np.int64).reshape(len(self.keys))
            offsets = np.array(index["offsets"], dtype=np.int64)
            self.offsets = offsets.reshape(len(self.keys), -1) if len(offsets) else offsets.reshape(0, 1)
            self.embedding_offsets = np.array(index.get("embeddings", []), dtype=np.int64)
            if dimensions and self.embedding_offsets.shape != (len(self.keys),):
                raise ValueError(f"{len(self.embedding_offsets)} embeddings of {len(self.keys)} samples")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"shards: expected an index of {path.name} in its record, found {error!r}") from error
        self._rows = map_rows(path, self.offsets, int(np.prod(shape)) * dtype.itemsize)
        self._embeddings = map_rows(path, self.embedding_offsets, (dimensions or 1) * dtype.itemsize)

    def __len__(self) -> int:
        return len(self.keys)

    def moments(self, indices: np.ndarray, mirrored: np.ndarray | int = 0) -> np.ndarray:
        """Return moments, (n, 2 or 1, C, h, w), of the mirrored images where ``mirrored``, (n,), is 1."""
        return self._rows[self.offsets[indices, mirrored]].view(self.dtype).reshape(-1, *self.shape)

    def embeddings(self, indices: np.ndarray) -> np.ndarray:
        """Return embeddings, (n, D)."""
        return self._embeddings[self.embedding_offsets[indices]].view(self.dtype)


def map_rows(path: Path, offsets: np.ndarray, nbytes: int) -> np.ndarray:
    """Memory-map a file as rows: row i is the ``nbytes`` bytes that start at byte i. Many rows are then copied in one call.

    Raises UserError if the offsets are outside the file.
    """
    size, end = path.stat().st_size, int(offsets.max()) + nbytes if offsets.size else 0
    if end > size or offsets.min(initial=0) < 0:
        raise UserError(f"shards: expected {end} bytes or more in {path}, found {size} (truncated?)")
    data = np.memmap(path, dtype=np.uint8, mode="r") if end else np.empty(nbytes, np.uint8)
    return sliding_window_view(data, nbytes)


class LatentStream(IterableDataset):
    """Batches of one rank, from ``images_seen`` up to ``images_total``.

    Args:
        manifest: manifest of the shards.
        batch_size: total batch size over all ranks.
        images_seen, images_total: first position, and position to stop before. The last batch is always full.
        seed: seed of the order and of the choice of mirrored encodings.
        mirror: whether to take the mirrored encoding with probability one half.
        rank, world_size: this process, and the number of processes.
        embeddings: whether to read the embeddings, which the shards must have.
        checks: whether to list the shards, to find missing ones before they are read.
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
        checks: bool = True,
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
        name = manifest.missing() if checks and (rank == 0 or manifest.cache is None) else None
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
            # LatentLoader raises it. torch would raise an error whose message is the traceback of the worker.
            yield error  # type: ignore[misc]

    def batches_at(self, positions: Iterable[int]) -> Iterator[LatentBatch]:
        """Read this rank's slices of the global batches that begin at these positions, in order. Shards in a store are fetched
        ahead."""
        if self.manifest.cache is None:
            yield from map(self.batch_at, positions)
            return
        positions = list(positions) if not isinstance(positions, range) else positions
        fetched = Prefetcher(self._visits(positions), lambda shard: self.manifest.fetch(self.manifest.shards[shard]))
        with fetched.running():
            for position in positions:
                fetched.reached(position)
                yield self.batch_at(position)

    def batch_at(self, position: int) -> LatentBatch:
        """Read this rank's slice of the global batch that begins at ``position``."""
        moments, labels, embeddings = [], [], []
        for number, indices, mirrored in self._samples(position):
            shard = self._shard(number)
            moments.append(shard.moments(indices, mirrored))
            labels.append(shard.labels[indices])
            if self.embeddings:
                embeddings.append(shard.embeddings(indices))
        return LatentBatch(joined(moments), joined(labels), joined(embeddings) if embeddings else None)

    def keys_at(self, position: int) -> list[str]:
        """Return the keys of this rank's slice of the global batch that begins at ``position``, for messages."""
        return [self._shard(number).keys[index] for number, indices, _ in self._samples(position) for index in indices]

    def _visits(self, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Yield (position, shard) for each batch position at which another shard begins to be read.

        Runs in another thread, so it does not use the orders that this object keeps.
        """
        shard_order, previous = lru_cache(2)(self._draw_shard_order), -1
        for position in positions:
            for _, shard, _, _ in self._slices(position, shard_order):
                if shard != previous:
                    yield position, shard
                previous = shard

    def _samples(self, position: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Split this rank's slice by shard. Yield shard, indices of samples in it, and whether each is mirrored (0 or 1)."""
        for epoch, shard, first, length in self._slices(position, self._shard_order):
            indices, mirrored = (values[first : first + length] for values in self._sample_order(epoch, shard))
            yield shard, indices, mirrored

    def _slices(
        self, position: int, shard_order: Callable[[int], tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[int, int, int, int]]:
        """Split this rank's slice by shard. Yield epoch, shard, start in the order of the shard's samples, and length."""
        size = self.batch_size // self.world_size
        position += self.rank * size
        stop = position + size
        while position < stop:
            epoch, within = divmod(position, self.count)
            order, ends = shard_order(epoch)
            slot = int(np.searchsorted(ends, within, side="right"))
            shard, end = int(order[slot]), int(ends[slot])
            first = within - (end - self.counts[shard])
            length = min(stop - position, end - within)
            yield epoch, shard, first, length
            position += length

    def _draw_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the order of an epoch's shards. Return it with the position in the epoch at which each shard ends."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
        return order, self.counts[order].cumsum()

    def _draw_sample_order(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the order of a shard's samples. Return it with whether each sample is mirrored (0 or 1)."""
        rng = np.random.default_rng((self.seed, epoch, shard))
        order = rng.permutation(self.counts[shard])
        return order, (rng.random(len(order)) < 0.5 if self.mirror else np.zeros(len(order))).astype(int)

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if (epoch,) not in self._orders:
            keep_newest(self._orders, (epoch,), self._draw_shard_order(epoch), MAX_ORDERS)
        return self._orders[(epoch,)]

    def _sample_order(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if (epoch, shard) not in self._orders:
            keep_newest(self._orders, (epoch, shard), self._draw_sample_order(epoch, shard), MAX_ORDERS)
        return self._orders[epoch, shard]

    def _shard(self, number: int) -> Shard:
        """Return a shard. Opens and checks it if it is not open."""
        if number not in self._shards:
            item, classes = self.manifest.shards[number], len(self.manifest.classes)
            shard = open_shard(self.manifest, item, self.mirror)
            if len(shard) != item["count"]:
                raise UserError(f"shards: expected {item['count']} samples in {item['name']}, found {len(shard)}")
            if classes and not -1 <= shard.labels.min() <= shard.labels.max() < classes:
                worst = shard.labels.max() if shard.labels.max() >= classes else shard.labels.min()
                raise UserError(f"shards: expected labels from 0 to {classes - 1}, found {worst} in {item['name']}")
            keep_newest(self._shards, number, shard, MAX_OPEN_SHARDS if self.manifest.cache is None else MAX_OPEN_COPIES)
        return self._shards[number]


def open_shard(manifest: Manifest, item: dict, mirror: bool) -> Shard:
    """Open a shard of the manifest. Uses the index in its record if the record is of this shard, and makes one otherwise.

    Raises UserError if ``mirror`` and the shard has no mirrored encodings.
    """
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
    """Concatenate along the batch. Does not copy a single part, which is the most common case."""
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def keep_newest(cache: dict, key: object, value: object, count: int) -> None:
    """Add an entry to a cache and drop the oldest entries beyond ``count``."""
    cache[key] = value
    while len(cache) > count:
        del cache[next(iter(cache))]


class LatentLoader(DataLoader):
    """A DataLoader that raises a UserError of a worker as it is, in one line. Its workers outlive SIGTERM."""

    def __iter__(self) -> Iterator[LatentBatch]:  # type: ignore[override]
        with signals_blocked():  # the workers inherit this, for all of their threads
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def latent_loader(stream: LatentStream, num_workers: int) -> DataLoader:
    """Return a loader of full batches. The order does not depend on the number of workers, who take every n-th batch."""
    pinned = torch.cuda.is_available()
    return LatentLoader(stream, None, num_workers=num_workers, pin_memory=pinned, worker_init_fn=end_by_own_process)
