"""Keys that occur several times in a source: webdataset needs each once. Later ones get a number, the first keeps its key.

Found by 64-bit hashes, some of them at a time, so that memory stays small for any number of keys. Two different keys with one
hash (for 100 million keys, once in 4,000 sources) cost one of them a needless number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import save_file

from ..files import atomic_file, this_process
from .pieces import hash_of, map_safetensors

AT_ONCE = 2**22
"""Hashes in memory at once, about."""


def none() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass
class Repeated:
    """Pictures whose key occurred before: their numbers, sorted; how often until then; and how many further marks the new key
    needs, because that key, too, was taken."""

    numbers: np.ndarray = field(default_factory=none)
    counts: np.ndarray = field(default_factory=none)
    marks: np.ndarray = field(default_factory=none)

    def renamed(self, number: int, key: str) -> str:
        place = int(np.searchsorted(self.numbers, number))
        if place == len(self.numbers) or self.numbers[place] != number:
            return key
        return new_key(key, int(self.counts[place]), int(self.marks[place]))

    def save(self, path: Path) -> None:
        with atomic_file(path, this_process()) as temporary:
            save_file(vars(self), temporary)

    @classmethod
    def load(cls, path: Path) -> Repeated:
        return cls(**map_safetensors(path)[0])


def new_key(key: str, count: int, marks: int) -> str:
    return f"{key}-{count}" + "-2" * marks


class HasKeys(Protocol):
    """What keys are read from: hashes in parts, and single entries."""

    def hashes(self) -> Iterator[np.ndarray]: ...

    def key(self, number: int) -> str: ...


def find_repeated(source: HasKeys) -> Repeated:
    """Find new keys for those that occurred before."""
    numbers, counts = repeated_hashes(source.hashes)
    if not len(numbers):
        return Repeated()
    keys = [source.key(int(number)) for number in numbers]
    marks = np.zeros(len(numbers), np.int64)
    unsettled = np.arange(len(numbers))
    taken: set[int] = set()  # new keys that are settled
    while len(unsettled):
        hashes = [hash_of(new_key(keys[each], int(counts[each]), int(marks[each]))) for each in unsettled]
        clash = occurs(np.array(hashes, np.uint64), source.hashes)
        again = []
        for each, value, clashes in zip(unsettled, hashes, clash):
            if clashes or value in taken:
                again.append(each)
            taken.add(value)
        unsettled = np.array(again, np.int64)
        marks[unsettled] += 1
    return Repeated(numbers, counts, marks)


def repeated_hashes(hashes: Callable[[], Iterable[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the hashes that occurred before, sorted, and how often, themselves included."""
    numbers, counts = [none()], [none()]
    for places, values in buckets(hashes):
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        since = np.arange(len(ordered)) - np.repeat(first, np.diff(np.append(first, len(ordered))))
        later = since > 0
        numbers.append(places[order[later]])
        counts.append(since[later] + 1)
    joined = np.concatenate(numbers)
    order = np.argsort(joined)
    return joined[order], np.concatenate(counts)[order]


def occurs(wanted: np.ndarray, hashes: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
    """Tell which of the wanted hashes are among the others."""
    return np.isin(wanted, np.concatenate([wanted[:0], *(part[np.isin(part, wanted)] for part in hashes())]))


def buckets(hashes: Callable[[], Iterable[np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield numbers and values of all hashes, those of the same first bits together."""
    total = sum(len(part) for part in hashes())
    bits = max(total // AT_ONCE, 0).bit_length()
    for bucket in range(2**bits):
        places, values, start = [none()], [np.empty(0, np.uint64)], 0
        for part in hashes():
            # A shift by all 64 bits is not defined.
            inside = np.flatnonzero(part >> np.uint64(64 - bits) == bucket) if bits else np.arange(len(part))
            places.append(inside + start)
            values.append(part[inside])
            start += len(part)
        if sum(map(len, values)):
            yield np.concatenate(places), np.concatenate(values)
