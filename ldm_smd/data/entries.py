"""Location of one encoded image of a source, and how to read it."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from ..errors import UserError, one_line
from .cache import FileCache

if TYPE_CHECKING:
    from datasets import Dataset

Result = TypeVar("Result")
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"})
UNSUPPORTED = frozenset(
    {".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"}
)
"""Images that Pillow does not read."""
HUGGING_FACE = "datasets:"
MAX_OPEN_FILES = 160
"""Files that each process keeps open: enough for two groups of tars (order.py) at the default settings."""


@dataclass(frozen=True)
class Entry:
    """Location of one encoded image, in one of four kinds of source.

    * a file: ``path``; ``size`` is None;
    * a file in a tar: ``size`` bytes at ``offset`` of ``path``;
    * a file in a zip: ``member`` of ``path``;
    * a Hugging Face dataset: row ``offset`` of split ``member`` of the dataset ``path``.
    """

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
            image = open_dataset(self.path, cast(str, self.member))[self.offset]["image"]
            return image["bytes"] or Path(image["path"]).read_bytes()
        if self.path.endswith(".zip"):
            return open_zip(self.path, os.getpid()).read(cast(str, self.member))
        if self.size is None:
            return Path(self.path).read_bytes()
        data = os.pread(self._open().fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise OSError(f"{len(data)} bytes instead of {self.size}: the tar is truncated")
        return data

    def _open(self) -> io.FileIO:
        return open_file(Path(self.path))


@dataclass(frozen=True)
class RemoteTar:
    """A tar in an object store, which is copied to a local cache before it is read.

    Attributes:
        size, stamp: bytes and version of the file, as the store reports them (``store.Stat``).
        cache: folder of the local copies.
        limit_bytes: maximum size of all copies.
    """

    url: str
    size: int | None
    stamp: str
    cache: str
    limit_bytes: int

    def use(self, function: Callable[[Path], Result]) -> Result:
        """Return ``function(path)`` for the path of a local copy."""
        cache = FileCache(self.cache, self.limit_bytes, key="images.source")
        return cache.use(self.url, function, size=self.size, stamp=self.stamp)


@dataclass(frozen=True)
class RemoteEntry(Entry):
    """An image in a tar in an object store."""

    tar: RemoteTar | None = None

    def _open(self) -> io.FileIO:
        assert self.tar is not None
        return open_local_copy(self.tar)


@lru_cache(maxsize=MAX_OPEN_FILES)
def open_file(path: Path) -> io.FileIO:
    """Open a file for ``os.pread``. Forked processes can share it, because ``pread`` uses no file position."""
    return open(path, "rb", buffering=0)


@lru_cache(maxsize=MAX_OPEN_FILES)
def open_local_copy(tar: RemoteTar) -> io.FileIO:
    """Open the local copy of a tar. It stays readable if the cache removes it."""
    return tar.use(lambda path: open(path, "rb", buffering=0))


@lru_cache(maxsize=8)
def open_zip(path: str, process: int) -> zipfile.ZipFile:
    """Open a zip, once per process: forked workers that share a file position would read each other's bytes."""
    return zipfile.ZipFile(path)


@lru_cache(maxsize=2)
def open_dataset(source: str, split: str) -> Dataset:
    """Load a dataset from a folder or the hub, with columns "image" (not decoded) and, if it has labels, "label"."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"images.source: expected the package datasets to read {source}, found {error}") from error
    name, configuration = source.removeprefix(HUGGING_FACE), None
    if not Path(name).exists() and ":" in name:
        name, _, configuration = name.rpartition(":")
    try:
        on_disk = Path(name, "dataset_info.json").is_file()
        dataset = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # errors of the library, of the hub, and of the readers of each file format
        found = f"{source}: {one_line(error)}"
        raise UserError(f"images.source: expected a dataset with the split {split}, found {found}") from error
    first = {
        wanted: name
        for wanted, feature_class in (("image", datasets.Image), ("label", datasets.ClassLabel))
        for name, feature in reversed(dataset.features.items())
        if isinstance(feature, feature_class)
    }
    if "image" not in first:
        raise UserError(f"images.source: expected a column of images, found {', '.join(dataset.column_names)} in {source}")
    dataset = dataset.select_columns(list(first.values())).rename_columns({name: wanted for wanted, name in first.items()})
    return dataset.cast_column("image", datasets.Image(decode=False))
