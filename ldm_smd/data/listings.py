"""Parts of a source, which are listed separately: a tar, a first-level folder, a zip, a Hugging Face dataset.

A part has a stamp, which changes with its contents, and a listing, the columns that the index stores.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import UserError
from .entries import EXTENSIONS, UNSUPPORTED, Entry, RemoteEntry, RemoteTar, open_dataset, open_zip
from .tar_headers import tar_members

logger = logging.getLogger(__name__)
MAX_LABEL_BYTES, MAX_LABEL = 64, 999_999_999
WHOLE_FILE = -1
UNLABELLED = -1


@dataclass
class Listing:
    """Columns of the images of a part, in order.

    Attributes:
        names: names of files or members, relative to the source; row numbers for a dataset.
        labels: UNLABELLED for no label; indices into ``classes`` if the part has class names.
        offsets, sizes: position of the bytes in a tar; otherwise 0 and WHOLE_FILE.
        classes: class names of the part; None if its labels are class numbers of the source.
        stamp: stamp that only a listing can find, such as that of all files in a folder.
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
        """Name of this part in the index, unique in the source."""
        return self.path

    def stamp(self) -> str | None:
        """Return a text that changes with the part's contents; None if that takes a listing."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise UserError(f"images.source: expected to read {self.path}, found {error.strerror}") from error
        return f"{status.st_size}-{status.st_mtime_ns}"

    @abstractmethod
    def listing(self) -> Listing:
        """List all images of the part. Raises UserError if it cannot be read."""

    def key(self, name: str) -> str:
        """Return the webdataset key of an image. Dots would end the key, so they are replaced."""
        return name[: name.rindex(".")].replace(".", "_")

    @abstractmethod
    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry: ...


@dataclass(frozen=True)
class TarPart(Part):
    """A webdataset tar.

    Members with the same key need not be adjacent. Images with the same key share its label, or have one label each, in order.
    """

    def key(self, name: str) -> str:
        return webdataset_key(name)[0].replace(".", "_")

    def listing(self) -> Listing:
        try:
            return self._use(self._list)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"images.source: expected an uncompressed tar, found {self.path}: {error}") from error

    def _use(self, function: Callable[[Path], Listing]) -> Listing:
        """Return ``function(path)`` for the path of the tar or its local copy."""
        return function(Path(self.path))

    def _list(self, path: Path) -> Listing:
        """List the images. Raises tarfile.TarError or OSError if the file cannot be read."""
        images: dict[str, list[tuple[str, int, int]]] = {}
        labels: dict[str, list[int]] = {}
        unsupported: list[str] = []
        with open(path, "rb") as file:
            for member in tar_members(path):
                key, extension = webdataset_key(member.name)
                suffix = f".{extension.lower()}"
                if extension == "cls":
                    data = os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES), member.offset)
                    labels.setdefault(key, []).append(self._label(data.strip(), member.name))
                elif suffix in EXTENSIONS:
                    images.setdefault(key, []).append(member)
                elif suffix in UNSUPPORTED:
                    unsupported.append(suffix)
        warn_of_unsupported(self.path, unsupported)
        names, labels_of_images, offsets, sizes = [], [], [], []
        for key, same_key in images.items():
            found = labels.get(key, [UNLABELLED])
            if len(found) not in (1, len(same_key)):
                expected = f"one label or {len(same_key)} for the key {key} in {self.path}"
                raise UserError(f"images.source: expected {expected}, found {len(found)}")
            for (name, offset, size), label in zip(same_key, cycle(found)):
                names.append(name)
                labels_of_images.append(label)
                offsets.append(offset)
                sizes.append(size)
        return Listing(names, labels_of_images, offsets, sizes)

    def _label(self, text: bytes, member: str) -> int:
        if text.isdigit() and int(text) <= MAX_LABEL and len(text) <= len(str(MAX_LABEL)):
            return int(text)
        raise UserError(f"images.source: expected a label from 0 to {MAX_LABEL} in {self.path}:{member}, found {text!r}")

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return Entry(key, label, self.path, name, offset, size)


@dataclass(frozen=True)
class RemoteTarPart(TarPart):
    """A webdataset tar in an object store. ``path`` is its URL, without credentials."""

    tar: RemoteTar

    def stamp(self) -> str | None:
        return f"{self.tar.size}-{self.tar.stamp}"

    def _use(self, function: Callable[[Path], Listing]) -> Listing:
        return self.tar.use(function)

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return RemoteEntry(key, label, self.path, name, offset, size, self.tar)


@dataclass(frozen=True)
class FolderPart(Part):
    """A first-level folder ``top`` of the folder ``path``, which is a class. If ``top`` is empty: the images directly in
    ``path``, without a class."""

    top: str = ""

    @property
    def name(self) -> str:
        return f"{self.path}/{self.top}"

    def stamp(self) -> str | None:
        return None  # rewriting a file in place does not change the folder's modification time

    def listing(self) -> Listing:
        names, digest = [], hashlib.sha256()
        files = list(self._files())
        warn_of_unsupported(self.name.rstrip("/"), [suffix_of(found.name) for found in files])
        for found in files:
            if not is_image(found):
                continue
            status = found.stat()
            names.append(os.path.relpath(found.path, self.path).replace(os.sep, "/"))
            digest.update(f"{names[-1]} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        labels = np.full(len(names), 0 if self.top else UNLABELLED)
        classes = [self.top] if self.top and names else []
        return Listing(names, labels.tolist(), classes=classes, stamp=digest.hexdigest())

    def _files(self) -> Iterator[os.DirEntry]:
        if self.top:
            yield from walk(os.path.join(self.path, self.top))
        else:
            yield from (found for found in sorted_folder(self.path) if not found.is_dir())

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return Entry(key, label, os.path.join(self.path, name))


@dataclass(frozen=True)
class ZipPart(Part):
    """A zip of a folder. The first folder in a member's name is its class; the second, if all members are below one folder, as
    in a zip of the folder itself."""

    def listing(self) -> Listing:
        files = [
            member.filename
            for member in open_zip(self.path, os.getpid()).infolist()
            if not member.is_dir()
            and not member.filename.startswith("__MACOSX/")
            and not any(part.startswith(".") for part in PurePosixPath(member.filename).parts)
        ]
        warn_of_unsupported(self.path, [suffix_of(name) for name in files])
        names = sorted(name for name in files if suffix_of(name) in EXTENSIONS)
        folders = [PurePosixPath(name).parts[:-1] for name in names]
        level = int(len({parts[:1] for parts in folders}) == 1 and any(len(parts) > 1 for parts in folders))
        tops = [parts[level] if len(parts) > level else None for parts in folders]
        classes = sorted({top for top in tops if top is not None})
        numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
        return Listing(names, [numbers.get(top, UNLABELLED) for top in tops], classes=classes)

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return Entry(key, label, self.path, name)


@dataclass(frozen=True)
class DatasetPart(Part):
    """A Hugging Face dataset: its first column of images, and its first column of class labels. ``path``: "datasets:NAME"."""

    split: str = "train"

    def stamp(self) -> str | None:
        return None

    def key(self, name: str) -> str:
        return name

    def listing(self) -> Listing:
        dataset = open_dataset(self.path, self.split)
        labelled = "label" in dataset.column_names
        # The library marks a missing label by -1 or None.
        labels = [UNLABELLED if label is None else label for label in dataset["label"]] if labelled else []
        any_label = any(label != UNLABELLED for label in labels)
        classes = list(dataset.features["label"].names) if any_label else []
        names = [f"{row:09d}" for row in range(len(dataset))]
        return Listing(names, labels or [UNLABELLED] * len(names), classes=classes)

    def entry(self, key: str, name: str, label: int | None, offset: int, size: int) -> Entry:
        return Entry(key, label, self.path, self.split, int(name))


def folder_parts(folder: Path) -> list[Part]:
    """Split a folder into its first-level folders, which may be links."""
    tops = [found.name for found in sorted_folder(str(folder)) if found.is_dir()]
    return [FolderPart(str(folder), top) for top in ("", *tops)]


def zip_part(path: str) -> Part:
    """Return the only part of a zip. Raises UserError if ``path`` is not a zip file."""
    if not os.path.isfile(path):
        raise UserError(f"images.source: expected a zip file, found no file {path}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"images.source: expected a zip file, found something else in {path}")
    return ZipPart(path)


def webdataset_key(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension as webdataset does, at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def walk(folder: str) -> Iterator[os.DirEntry]:
    """Yield the files below a folder, sorted by the parts of their paths. Does not follow links to folders."""
    for found in sorted_folder(folder):
        if found.is_dir(follow_symlinks=False):
            yield from walk(found.path)
        else:
            yield found


def sorted_folder(folder: str) -> list[os.DirEntry]:
    """List a folder without hidden files and folders."""
    with os.scandir(folder) as found:
        return sorted((each for each in found if not each.name.startswith(".")), key=lambda each: each.name)


def is_image(found: os.DirEntry) -> bool:
    return suffix_of(found.name) in EXTENSIONS and found.is_file()


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def warn_of_unsupported(source: str, suffixes: Sequence[str]) -> None:
    """Log how many files with these suffixes are images that cannot be read, so that they are not missed in silence."""
    found = [suffix for suffix in suffixes if suffix in UNSUPPORTED]
    if found:
        logger.warning(
            "%s: skipped %d images in formats that are not read (%s)", source, len(found), ", ".join(sorted(set(found)))
        )
