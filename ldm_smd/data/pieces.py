"""The index of one part of a source, in columns: made once, then memory-mapped, by all processes of a machine together.

A piece on disk is a safetensors file. Its columns: ``text``, all names joined, and where each ``ends`` in it; ``labels``,
``offsets`` and ``sizes`` (listings.py); ``hashes``, 64 bits of each key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..files import atomic_file, this_process
from .listings import UNLABELLED, Listing

OPEN_PIECES = 160
MOST_LABELS = 100_000
"""Different labels of a part that are counted; more are none that anyone would have names for."""


@dataclass(frozen=True)
class Summary:
    """What the whole index needs to know of a piece without opening it.

    Attributes:
        pictures, files: hashes of names, labels and sizes; and of what shows that a file was changed.
        classes: which the part names itself, for its labels; None where labels are numbers.
        labels: the different ones, UNLABELLED too, at most MOST_LABELS of them.
        highest: the highest of all.
    """

    count: int
    pictures: str
    files: str
    classes: list[str] | None
    labels: list[int]
    highest: int


class Piece:
    """Columns of a part's pictures; memory-mapped where they come from a file."""

    def __init__(self, columns: dict[str, np.ndarray], summary: Summary) -> None:
        self.columns, self.summary = columns, summary

    def __len__(self) -> int:
        return self.summary.count

    @property
    def hashes(self) -> np.ndarray:
        return self.columns["hashes"]

    def name(self, number: int) -> str:
        ends = self.columns["ends"]
        start = int(ends[number - 1]) if number else 0
        return bytes(self.columns["text"][start : int(ends[number])]).decode("utf-8", "surrogateescape")

    def row(self, number: int) -> tuple[str, int, int, int]:
        """Return name, label, offset and size."""
        labels, offsets, sizes = (self.columns[name] for name in ("labels", "offsets", "sizes"))
        return self.name(number), int(labels[number]), int(offsets[number]), int(sizes[number])

    def first_with_label(self, label: int) -> int:
        return int(np.flatnonzero(self.columns["labels"] == label)[0])

    @classmethod
    def of(cls, listing: Listing, stamp: str | None, key: Callable[[str], str]) -> Piece:
        names = [name.encode("utf-8", "surrogateescape") for name in listing.names]
        text = np.frombuffer(bytearray().join(names), np.uint8)
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        hashes = np.fromiter((hash_of(key(name)) for name in listing.names), np.uint64, len(names))
        columns: dict[str, np.ndarray] = {"text": text, "ends": ends, "hashes": hashes, **listing.arrays()}
        pictures = hashlib.sha256(json.dumps(listing.classes).encode())
        for column in ("text", "ends", "labels", "sizes"):
            pictures.update(columns[column].data)
        labels = np.unique(columns["labels"]).tolist()
        highest = labels[-1] if labels else UNLABELLED
        files = stamp or listing.stamp
        return cls(columns, Summary(len(names), pictures.hexdigest(), files, listing.classes, labels[:MOST_LABELS], highest))

    def save(self, path: Path) -> None:
        with atomic_file(path, this_process()) as temporary:
            save_file(self.columns, temporary, metadata={"summary": json.dumps(vars(self.summary))})

    @classmethod
    def load(cls, path: Path) -> Piece:
        """Map a file. Raises OSError, ValueError or KeyError for anything but a whole piece."""
        return _load(str(path))


def hash_of(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


NUMPY_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64}


@lru_cache(maxsize=OPEN_PIECES)
def _load(path: str) -> Piece:
    columns, metadata = map_safetensors(Path(path))
    return Piece(columns, Summary(**json.loads(metadata["summary"])))


def map_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Memory-map the arrays of a safetensors file, which the library only copies; return them and the metadata."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    data = np.memmap(path, np.uint8, mode="r")
    found = {}
    for name, entry in header.items():
        start, stop = (8 + length + each for each in entry["data_offsets"])
        found[name] = data[start:stop].view(NUMPY_TYPES[entry["dtype"]])  # in one dimension
    return found, metadata
