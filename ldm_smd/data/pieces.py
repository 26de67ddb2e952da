"""Pieces of an index: the columns of one part of a source, made once and then memory-mapped by all processes.

A piece on disk is a safetensors file. Its columns are ``text``, all names joined; ``ends``, the end of each name in it;
``labels``, ``offsets`` and ``sizes`` (listings.py); and ``hashes``, a 64-bit hash of each key.
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

MAX_OPEN_PIECES = 160


@dataclass(frozen=True)
class Summary:
    """What the index needs from a piece without opening it. Saved as JSON.

    Attributes:
        count: number of images.
        pictures: hash of names, labels and sizes.
        files: hash or stamp that changes with the files.
        classes: class names of the part; None if its labels are class numbers of the source.
        lowest, highest: extreme labels. UNLABELLED is below all others.
    """

    count: int
    pictures: str
    files: str
    classes: list[str] | None
    lowest: int
    highest: int


class Piece:
    """Columns of the images of a part, memory-mapped if loaded from a file."""

    def __init__(self, columns: dict[str, np.ndarray], summary: Summary) -> None:
        self.columns, self.summary = columns, summary

    def __len__(self) -> int:
        return self.summary.count

    @property
    def hashes(self) -> np.ndarray:
        return self.columns["hashes"]

    @property
    def labels(self) -> np.ndarray:
        return self.columns["labels"]

    def name(self, row: int) -> str:
        ends = self.columns["ends"]
        start = int(ends[row - 1]) if row else 0
        return bytes(self.columns["text"][start : int(ends[row])]).decode("utf-8", "surrogateescape")

    def row(self, row: int) -> tuple[str, int, int, int]:
        """Return name, label, offset and size."""
        offsets, sizes = self.columns["offsets"], self.columns["sizes"]
        return self.name(row), int(self.labels[row]), int(offsets[row]), int(sizes[row])

    @classmethod
    def of(cls, listing: Listing, stamp: str | None, key: Callable[[str], str]) -> Piece:
        names = [name.encode("utf-8", "surrogateescape") for name in listing.names]
        text = np.frombuffer(bytearray().join(names), np.uint8)
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        hashes = np.fromiter((key_hash(key(name)) for name in listing.names), np.uint64, len(names))
        columns: dict[str, np.ndarray] = {"text": text, "ends": ends, "hashes": hashes, **listing.arrays()}
        pictures = hashlib.sha256(json.dumps(listing.classes).encode())
        for column in ("text", "ends", "labels", "sizes"):
            pictures.update(columns[column].data)
        labels = columns["labels"] if names else np.array([UNLABELLED])
        extremes = int(labels.min()), int(labels.max())
        return cls(columns, Summary(len(names), pictures.hexdigest(), stamp or listing.stamp, listing.classes, *extremes))

    def save(self, path: Path) -> None:
        with atomic_file(path, this_process()) as temporary:
            save_file(self.columns, temporary, metadata={"summary": json.dumps(vars(self.summary))})

    @classmethod
    def load(cls, path: Path) -> Piece:
        """Memory-map a file. Raises OSError, ValueError or KeyError if it is not an intact piece."""
        return _load(str(path))


def key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


NUMPY_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64}


@lru_cache(maxsize=MAX_OPEN_PIECES)
def _load(path: str) -> Piece:
    columns, metadata = map_safetensors(Path(path))
    return Piece(columns, Summary(**json.loads(metadata["summary"])))


def map_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Memory-map a safetensors file and return its arrays and metadata. (The library's own loader copies them.)"""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < path.stat().st_size:
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    data = np.memmap(path, np.uint8, mode="r")
    found = {}
    for name, entry in header.items():
        start, stop = (8 + length + each for each in entry["data_offsets"])
        found[name] = data[start:stop].view(NUMPY_TYPES[entry["dtype"]])  # all columns are one-dimensional
    return found, metadata
