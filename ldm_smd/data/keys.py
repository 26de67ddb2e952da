"""Repeated keys of a source. webdataset needs unique keys, so all but the first image with a key get a number appended.

Repeated keys are found by 64-bit hashes. The hashes are read once, sorted in runs that are kept in files, and compared one
bucket at a time, so that memory stays small for any number of keys. If two different keys have the same hash, one gets a number
that it did not need. With 100 million keys, this happens in one source of 4,000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
from safetensors.numpy import save_file

from ..files import atomic_file, this_process
from .pieces import key_hash, map_safetensors

BUCKET_SIZE = 2**19
"""Approximate number of hashes that are compared at a time."""
RUN_SIZE = 2**22
"""Approximate number of hashes in a sorted run; 16 bytes each in its file."""


def no_numbers() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass
class RepeatedKeys:
    """Images whose key occurred before.

    Attributes:
        numbers: indices of the images, sorted.
        counts: how often the key has occurred, up to and including this image.
        marks: number of "-2" suffixes that the new key needs because it, too, was taken.
    """

    numbers: np.ndarray = field(default_factory=no_numbers)
    counts: np.ndarray = field(default_factory=no_numbers)
    marks: np.ndarray = field(default_factory=no_numbers)

    def renamed(self, number: int, key: str) -> str:
        """Return the new key of image ``number``; ``key`` itself if it is not repeated."""
        row = int(np.searchsorted(self.numbers, number))
        if row == len(self.numbers) or self.numbers[row] != number:
            return key
        return new_key(key, int(self.counts[row]), int(self.marks[row]))

    def save(self, path: Path) -> None:
        with atomic_file(path, this_process()) as temporary:
            save_file(vars(self), temporary)

    @classmethod
    def load(cls, path: Path) -> RepeatedKeys:
        return cls(**map_safetensors(path)[0])


def new_key(key: str, count: int, marks: int) -> str:
    return f"{key}-{count}" + "-2" * marks


class HasKeys(Protocol):
    """A source of keys: hashes of all keys, part by part, and single keys by number."""

    def hashes(self) -> Iterator[np.ndarray]: ...

    def key(self, number: int) -> str: ...


def find_repeated_keys(source: HasKeys, folder: Path | None = None) -> RepeatedKeys:
    """Find repeated keys and unique new ones for them. ``folder`` is for temporary files; None: that of the system."""
    numbers, counts = repeated_hashes(source.hashes(), folder)
    if not len(numbers):
        return RepeatedKeys()
    keys = [source.key(int(number)) for number in numbers]
    marks = np.zeros(len(numbers), np.int64)
    unsettled = np.arange(len(numbers))
    taken: set[int] = set()  # hashes of the new keys
    while len(unsettled):
        hashes = [key_hash(new_key(keys[each], int(counts[each]), int(marks[each]))) for each in unsettled]
        clash = is_among(np.array(hashes, np.uint64), source.hashes)
        again = []
        for each, value, clashes in zip(unsettled, hashes, clash):
            if clashes or value in taken:
                again.append(each)
            taken.add(value)
        unsettled = np.array(again, np.int64)
        marks[unsettled] += 1
    return RepeatedKeys(numbers, counts, marks)


def repeated_hashes(hashes: Iterable[np.ndarray], folder: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of hashes that occurred before, sorted, and how often up to and including them."""
    numbers, counts = [no_numbers()], [no_numbers()]
    for values, indices in buckets(hashes, folder):
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        since = np.arange(len(ordered)) - np.repeat(first, np.diff(np.append(first, len(ordered))))
        later = since > 0
        numbers.append(indices[order[later]])
        counts.append(since[later] + 1)
    joined = np.concatenate(numbers)
    order = np.argsort(joined)
    return joined[order], np.concatenate(counts)[order]


def is_among(wanted: np.ndarray, hashes: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
    """Return a mask of the wanted hashes that are among ``hashes``."""
    return np.isin(wanted, np.concatenate([wanted[:0], *(part[np.isin(part, wanted)] for part in hashes())]))


def buckets(hashes: Iterable[np.ndarray], folder: Path | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield values and indices of all hashes, in buckets of equal leading bits, of about BUCKET_SIZE hashes each.

    Equal values come in the order of their indices.
    """
    # Windows and NFS cannot remove files that are mapped, as they are after an error.
    with TemporaryDirectory(dir=folder, prefix=".keys-", ignore_cleanup_errors=True) as temporary:
        runs = [save_run(*run, Path(temporary) / f"{number}.npy") for number, run in enumerate(sorted_runs(hashes))]
        count = max(sum(map(len, runs)) // BUCKET_SIZE, 1)
        edges = np.array([bucket * 2**64 // count for bucket in range(1, count)], np.uint64)
        cuts = [[0, *np.searchsorted(run["value"], edges).tolist(), len(run)] for run in runs]
        for bucket in range(count if runs else 0):
            inside = np.concatenate([run[cut[bucket] : cut[bucket + 1]] for run, cut in zip(runs, cuts)])
            if len(inside):
                yield inside["value"], inside["index"]
        del runs


def sorted_runs(hashes: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Join parts to runs of about RUN_SIZE hashes; yield the hashes of each, sorted, and their indices."""
    parts: list[np.ndarray] = []
    start = waiting = 0
    for part in chain(hashes, [None]):
        if part is not None:
            parts.append(np.array(part))  # copied, so that the file of a memory-mapped part is closed
            waiting += len(part)
        if waiting and (part is None or waiting >= RUN_SIZE):
            values = np.concatenate(parts)
            order = np.argsort(values, kind="stable")
            yield values[order], order + start
            start, waiting, parts = start + waiting, 0, []


def save_run(values: np.ndarray, indices: np.ndarray, path: Path) -> np.ndarray:
    """Write a run to a file; returns it memory-mapped, with the fields "value" and "index"."""
    run = np.empty(len(values), [("value", np.uint64), ("index", np.int64)])
    run["value"], run["index"] = values, indices
    np.save(path, run)
    return np.load(path, mmap_mode="r")
