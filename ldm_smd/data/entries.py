"""One encoded image of a source: where it is, and how it is read."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..errors import UserError, one_line

if TYPE_CHECKING:
    from datasets import Dataset

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
HUGGING_FACE = "datasets:"
OPEN_FILES = 160
"""Files that stay open for the next picture, in each process: those of the tars that are mixed at a time."""


@dataclass(frozen=True)
class Entry:
    """Location of one encoded image: ``size`` bytes at ``offset`` of ``path``, the entire file where ``size`` is None, or
    the zip member ``member``, or row ``offset`` of the Hugging Face dataset that ``path`` names, split ``member``."""

    key: str
    label: int | None
    path: str
    member: str | None = None
    offset: int = 0
    size: int | None = None

    @property
    def name(self) -> str:
        if self.path.startswith(HUGGING_FACE):
            return f"{self.path}, {self.member}, row {self.offset}"
        return f"{self.path}:{self.member}" if self.member else self.path

    def read(self) -> bytes:
        if self.path.startswith(HUGGING_FACE):
            picture = open_dataset(self.path, cast(str, self.member))[self.offset]["image"]
            return picture["bytes"] or Path(picture["path"]).read_bytes()
        if self.path.endswith(".zip"):
            return open_zip(self.path, os.getpid()).read(cast(str, self.member))
        if self.size is None:
            return Path(self.path).read_bytes()
        data = os.pread(_descriptor(self.path).number, self.size, self.offset)
        if len(data) < self.size:
            raise OSError(f"{len(data)} bytes and not {self.size}: the tar was cut short")
        return data


class _Descriptor:
    """An open file, closed when nothing refers to it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def _descriptor(path: str) -> _Descriptor:
    """Forked processes may share it: reads name their position."""
    return _Descriptor(path)


@lru_cache(maxsize=8)
def open_zip(path: str, process: int) -> zipfile.ZipFile:
    """Open a zip, once per process: forked workers that shared a file position would read each other's bytes."""
    return zipfile.ZipFile(path)


@lru_cache(maxsize=2)
def open_dataset(source: str, split: str) -> Dataset:
    """Load a dataset, saved to a folder or of the hub, with the columns image, not decoded, and label if it has labels."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"images.source: expected the package datasets, to read {source}, found {error}") from error
    name = source.removeprefix(HUGGING_FACE)
    try:
        on_disk = Path(name, "dataset_info.json").is_file()
        dataset = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, split=split)
    except Exception as error:  # the library's own, the hub's, and those of whatever reads the files
        found = f"{source}: {one_line(error)}"
        raise UserError(f"images.source: expected a dataset with the split {split}, found {found}") from error
    first = {
        wanted: name
        for wanted, feature_class in (("image", datasets.Image), ("label", datasets.ClassLabel))
        for name, feature in reversed(dataset.features.items())
        if isinstance(feature, feature_class)
    }
    if "image" not in first:
        raise UserError(f"images.source: expected a column of pictures, found {', '.join(dataset.column_names)} in {source}")
    dataset = dataset.select_columns(list(first.values())).rename_columns({name: wanted for wanted, name in first.items()})
    return dataset.cast_column("image", datasets.Image(decode=False))
