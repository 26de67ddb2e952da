"""Parts of a source that are listed at once: a tar, a first-level folder, a zip, a Hugging Face dataset.

A part has a stamp, which changes when the part does, and a listing, the columns that an index keeps of it.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import UserError
from .entries import EXTENSIONS, Entry, RemoteEntry, RemoteTar, open_dataset, open_zip
from .tar_headers import tar_members

LABEL_BYTES, LARGEST_LABEL = 64, 999_999_999
WHOLE_FILE = -1
UNLABELLED = -1


@dataclass
class Listing:
    """Columns of a part's pictures, in order.

    Attributes:
        names: of files or members, relative to the source; row numbers of a dataset.
        labels: UNLABELLED for none; indices into ``classes`` where the part names its classes itself.
        offsets, sizes: of the bytes in a tar; otherwise 0 and WHOLE_FILE.
        stamp: of what no single file's stamp tells: a folder's files.
    """

    names: list[str]
    labels: Sequence[int]
    offsets: Sequence[int] = ()
    sizes: Sequence[int] = ()
    classes: list[str] | None = None
    stamp: str = ""

    def arrays(self) -> dict[str, np.ndarray]:
        count = len(self.names)
        return {
            "labels": np.fromiter(self.labels, np.int32, count),
            "offsets": np.array(self.offsets, np.int64) if self.offsets else np.zeros(count, np.int64),
            "sizes": np.array(self.sizes, np.int64) if self.sizes else np.full(count, WHOLE_FILE, np.int64),
        }


@dataclass(frozen=True)
class Part(ABC):
    """A part of a source, at ``path``."""

    path: str

    @property
    def name(self) -> str:
        """Of this part among all, for the index."""
        return self.path

    def stamp(self) -> str | None:
        """Return what changes when the part does; None where only a listing can tell."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise UserError(f"images.source: expected to read {self.path}, found {error.strerror}") from error
        return f"{status.st_size}-{status.st_mtime_ns}"

    @abstractmethod
    def listing(self) -> Listing:
        """Read it all. Raises UserError."""

    def key(self, name: str) -> str:
        """Make a webdataset key: without dots, which would split it."""
        return name[: name.rindex(".")].replace(".", "_")

    @abstractmethod
    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry: ...


@dataclass(frozen=True)
class TarPart(Part):
    """A webdataset tar. Members of one key need not be neighbours. Images of one key share its label, or have one each, in
    order."""

    def key(self, name: str) -> str:
        return webdataset_key(name)[0].replace(".", "_")

    def listing(self) -> Listing:
        return self._list(Path(self.path))

    def _list(self, path: Path) -> Listing:
        pictures: dict[str, list[tuple[str, int, int]]] = {}
        labels: dict[str, list[int]] = {}
        try:
            with open(path, "rb") as file:
                for member in tar_members(path):
                    key, extension = webdataset_key(member.name)
                    if extension == "cls":
                        data = os.pread(file.fileno(), min(member.size, LABEL_BYTES), member.offset)
                        labels.setdefault(key, []).append(self._label(data.strip(), member.name))
                    elif f".{extension.lower()}" in EXTENSIONS:
                        pictures.setdefault(key, []).append(member)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"images.source: expected an uncompressed tar, found {self.path}: {error}") from error
        names, known, offsets, sizes = [], [], [], []
        for key, same_key in pictures.items():
            found = labels.get(key, [UNLABELLED])
            if len(found) not in (1, len(same_key)):
                expected = f"one label or {len(same_key)} for the key {key} in {self.path}"
                raise UserError(f"images.source: expected {expected}, found {len(found)}")
            for (name, offset, size), label in zip(same_key, cycle(found)):
                names.append(name)
                known.append(label)
                offsets.append(offset)
                sizes.append(size)
        return Listing(names, known, offsets, sizes)

    def _label(self, text: bytes, member: str) -> int:
        if text.isdigit() and int(text) <= LARGEST_LABEL and len(text) <= len(str(LARGEST_LABEL)):
            return int(text)
        raise UserError(f"images.source: expected a label from 0 to {LARGEST_LABEL} in {self.path}:{member}, found {text!r}")

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return Entry(key, label, self.path, name, offset, size)


@dataclass(frozen=True)
class RemoteTarPart(TarPart):
    """A webdataset tar in a store; ``path`` is its URL, without credentials."""

    tar: RemoteTar

    def stamp(self) -> str | None:
        return f"{self.tar.size}-{self.tar.stamp}"

    def listing(self) -> Listing:
        return self.tar.use(self._list)

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return RemoteEntry(key, label, self.path, name, offset, size, self.tar)


@dataclass(frozen=True)
class FolderPart(Part):
    """A first-level folder ``top`` of a folder ``path``, which is a class; or the pictures beside the folders, of none, where
    ``top`` is empty."""

    top: str = ""

    @property
    def name(self) -> str:
        return f"{self.path}/{self.top}"

    def stamp(self) -> str | None:
        return None  # a file may be rewritten where it is, which changes no folder

    def listing(self) -> Listing:
        names, digest = [], hashlib.sha256()
        for found in self._files():
            status = found.stat()
            names.append(os.path.relpath(found.path, self.path).replace(os.sep, "/"))
            digest.update(f"{names[-1]} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        labels = np.full(len(names), 0 if self.top else UNLABELLED)
        return Listing(names, labels.tolist(), classes=[self.top] if self.top else [], stamp=digest.hexdigest())

    def _files(self) -> Iterator[os.DirEntry]:
        if self.top:
            yield from walk(os.path.join(self.path, self.top))
        else:
            yield from (found for found in sorted_folder(self.path) if is_picture(found))

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return Entry(key, label, os.path.join(self.path, name))


@dataclass(frozen=True)
class ZipPart(Part):
    """A zip of a folder: the first folder of a member's name is its class."""

    def listing(self) -> Listing:
        names = sorted(
            member.filename
            for member in open_zip(self.path, os.getpid()).infolist()
            if not member.is_dir()
            and PurePosixPath(member.filename).suffix.lower() in EXTENSIONS
            and not member.filename.startswith("__MACOSX/")
        )
        tops = [name.partition("/")[0] if "/" in name else None for name in names]
        classes = sorted({top for top in tops if top is not None})
        numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
        return Listing(names, [numbers.get(top, UNLABELLED) for top in tops], classes=classes)

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return Entry(key, label, self.path, name)


@dataclass(frozen=True)
class DatasetPart(Part):
    """A Hugging Face dataset: the first column of images, with the first of class labels. ``path``: "datasets:NAME"."""

    split: str = "train"

    def stamp(self) -> str | None:
        return None

    def key(self, name: str) -> str:
        return name

    def listing(self) -> Listing:
        dataset = open_dataset(self.path, self.split)
        labelled = "label" in dataset.column_names
        # The library marks rows without a label by -1, or by None.
        labels = [UNLABELLED if label is None else label for label in dataset["label"]] if labelled else []
        known = any(label != UNLABELLED for label in labels)
        classes = list(dataset.features["label"].names) if known else []
        names = [f"{row:09d}" for row in range(len(dataset))]
        return Listing(names, labels or [UNLABELLED] * len(names), classes=classes)

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return Entry(key, label, self.path, self.split, int(name))


def folder_parts(folder: Path) -> list[Part]:
    """Divide a folder by its first-level folders."""
    tops = [found.name for found in sorted_folder(str(folder)) if found.is_dir(follow_symlinks=False)]
    return [FolderPart(str(folder), top) for top in ("", *tops)]


def zip_part(path: str) -> Part:
    """Raises UserError unless there is a zip."""
    if not os.path.isfile(path):
        raise UserError(f"images.source: expected a zip file, found no file {path}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"images.source: expected a zip file, found something else in {path}")
    return ZipPart(path)


def webdataset_key(name: str) -> tuple[str, str]:
    """Split a member's name as webdataset does: the key ends at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def walk(folder: str) -> Iterator[os.DirEntry]:
    """Yield the pictures below a folder, in the order of their paths' parts."""
    for found in sorted_folder(folder):
        if found.is_dir(follow_symlinks=False):
            yield from walk(found.path)
        elif is_picture(found):
            yield found


def sorted_folder(folder: str) -> list[os.DirEntry]:
    with os.scandir(folder) as found:
        return sorted(found, key=lambda each: each.name)


def is_picture(found: os.DirEntry) -> bool:
    return os.path.splitext(found.name)[1].lower() in EXTENSIONS and found.is_file()
