"""Image sources: a folder, a zip of one, webdataset tars here or at a URL, or a Hugging Face dataset, listed alike.

A source is listed once, in sorted order, without decoding anything: image ``i`` is the same for any number of processes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import braceexpand
from webdataset.gopen import Pipe, gopen, gopen_schemes

from ..errors import UserError, one_line
from ..files import atomic_file, this_process
from .settings import ImagesConfig

if TYPE_CHECKING:
    from datasets import Dataset

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
HUGGING_FACE = "datasets:"
CHUNK_BYTES = 2**20
LABEL = re.compile(rb"\d{1,9}")
UNNAMED_CLASSES = 1_000
"""Labels without a list of names may leave out classes if there are at most so many; otherwise a tenth must occur."""
NUMBER_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
MOST_TARS = 1_000_000
"""Most tars that braces may stand for."""

# As webdataset reads gs:// with gsutil; 1.0 has nothing for s3://.
gopen_schemes.setdefault("s3", lambda url, mode, bufsize: Pipe(["aws", "s3", "cp", url, "-"], mode=mode, bufsize=bufsize))


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
            picture = _dataset(self.path, self.member)[self.offset]["image"]
            return picture["bytes"] or Path(picture["path"]).read_bytes()
        if self.path.endswith(".zip"):
            return _zip(self.path, os.getpid()).read(cast(str, self.member))
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


def list_entries(config: ImagesConfig) -> tuple[list[Entry], list[str]]:
    """List all images of the source in sorted order, and the class names ([] where the source has no labels).

    Raises UserError where the source is missing or empty, or a label lies outside the classes.
    """
    source = config.source
    named = source.startswith(HUGGING_FACE) or source.endswith(".zip") or Path(source).is_dir()
    if named and config.classes is not None:
        raise UserError(f"images.classes: expected null, {source} names its classes itself, found {config.classes}")
    if source.startswith(HUGGING_FACE):
        entries, classes = _list_dataset(source, config.split)
    elif Path(source).is_dir():
        entries, classes = _list_folder(Path(source))
    elif source.endswith(".zip"):
        entries, classes = _list_zip(Path(source))
    else:
        entries, classes = _list_tars(source, config)
    if not entries:
        raise UserError(f"images.source: expected pictures ({', '.join(sorted(EXTENSIONS))}), found none in {source}")
    for entry in entries if classes else []:
        if entry.label is None or not 0 <= entry.label < len(classes):
            raise UserError(
                f"images.source: expected a label from 0 to {len(classes) - 1} ({len(classes)} classes), "
                f"found {entry.label} for {entry.name} (key {entry.key})"
            )
    return with_unique_keys(entries), classes


def fingerprint(entries: list[Entry], contents: bool = False) -> str:
    """Return a SHA-256 that changes when an image does: by the size and modification time of its file, or by its contents."""
    digest = hashlib.sha256()
    stamp_of_file = lru_cache(maxsize=None)(_stamp)
    for entry in entries:
        stamp = _sha256(entry) if contents else stamp_of_file(entry.path)
        digest.update(repr((entry.key, entry.label, entry.offset, entry.size, stamp)).encode())
    return digest.hexdigest()


def _stamp(path: str) -> tuple[int, int] | None:
    """Size and modification time; None for a Hugging Face dataset, which has another name in every version."""
    if path.startswith(HUGGING_FACE):
        return None
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _sha256(entry: Entry) -> str:
    try:
        return hashlib.sha256(entry.read()).hexdigest()
    except (OSError, zipfile.BadZipFile) as error:  # it will be skipped, and listed
        return type(error).__name__


def _list_folder(folder: Path) -> tuple[list[Entry], list[str]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    return _labelled_by_folder([Entry(path.relative_to(folder).as_posix(), None, str(path)) for path in paths])


def _list_zip(path: Path) -> tuple[list[Entry], list[str]]:
    if not path.is_file():
        raise UserError(f"images.source: expected a zip file, found no file {path}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"images.source: expected a zip file, found something else in {path}")
    members = sorted(
        member.filename
        for member in _zip(str(path), os.getpid()).infolist()
        if not member.is_dir()
        and PurePosixPath(member.filename).suffix.lower() in EXTENSIONS
        and not member.filename.startswith("__MACOSX/")
    )
    return _labelled_by_folder([Entry(member, None, str(path), member) for member in members])


def _labelled_by_folder(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Label entries whose keys are file names by their first folder, and cut the extension. Those at the top have no label."""
    tops = [PurePosixPath(entry.key).parts[0] if "/" in entry.key else None for entry in entries]
    classes = sorted({top for top in tops if top is not None})
    labels: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    keys = [str(PurePosixPath(entry.key).with_suffix("")) for entry in entries]
    return [replace(entry, key=key, label=labels.get(top)) for entry, key, top in zip(entries, keys, tops)], classes


def _list_tars(pattern: str, config: ImagesConfig) -> tuple[list[Entry], list[str]]:
    paths: list[str] = []
    # A shell command may have braces of its own.
    for expanded in [pattern] if pattern.startswith("pipe:") else _expand_braces(pattern):
        remote = expanded.startswith("pipe:") or urlsplit(expanded).scheme in gopen_schemes
        paths += [str(_fetch(expanded, config))] if remote else sorted(glob.glob(expanded))
    if not paths:
        raise UserError(f"images.source: expected a folder, a .zip or webdataset tars, found nothing at {pattern}")
    entries = [entry for path in paths for entry in _list_tar(path)]
    classes_file = Path(config.classes) if config.classes else Path(paths[0]).parent / "classes.json"
    if classes_file.is_file():
        classes = json.loads(classes_file.read_text(encoding="utf-8"))
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"images.classes: expected a JSON list of class names, found something else in {classes_file}")
    elif config.classes:
        raise UserError(f"images.classes: expected a JSON list of class names, found no file {classes_file}")
    else:
        classes = _unnamed_classes({entry.label for entry in entries if entry.label is not None}, classes_file)
    if all(entry.label is None for entry in entries):
        classes = []
    return entries, classes


def _expand_braces(pattern: str) -> list[str]:
    """Expand braces, as in train-{000..009}.tar."""
    # braceexpand makes lists of all: too many must be noticed before.
    lengths = [abs(float(last) - float(first)) + 1 for first, last in NUMBER_RANGE.findall(pattern)]
    if math.prod(lengths) > MOST_TARS:
        raise UserError(f"images.source: expected braces for at most {MOST_TARS:,} tars, found more in {pattern!r}")
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"images.source: expected balanced braces, found {pattern!r}: {one_line(error)}") from error


def _unnamed_classes(labels: set[int], classes_file: Path) -> list[str]:
    """Name classes by number, 0 to the highest label: the same for parts of a set that leave out some. A stray label must not
    make a list of a billion."""
    count = max(labels, default=-1) + 1
    if count > UNNAMED_CLASSES and count > 10 * len(labels):
        raise UserError(
            f"images.classes: expected a JSON list of class names for {len(labels)} different labels up to {count - 1}, "
            f"found no file {classes_file}"
        )
    return [str(label) for label in range(count)]


def _fetch(url: str, config: ImagesConfig) -> Path:
    """Fetch the tar at a URL to ``config.cache``, once, and return its path."""
    if url.startswith("pipe:") and not config.allow_pipe:
        found = f"a shell command, {url!r}; images.allow_pipe=true has it run"
        raise UserError(f"images.source: expected files or URLs, found {found}")
    name = PurePosixPath(urlsplit(url).path).name if "://" in url else "pipe.tar"
    path = Path(config.cache).expanduser() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if path.is_file():
        print(f"{url}: the copy of an earlier run, {path}", file=sys.stderr)
        return path
    print(f"fetching {url}", file=sys.stderr)
    try:
        with atomic_file(path, this_process()) as temporary, gopen(url) as stream, open(temporary, "wb") as file:
            while chunk := stream.read(CHUNK_BYTES):
                file.write(chunk)
            stream.close()  # raises where the reader did not end well
    except OSError as error:
        raise UserError(f"images.source: expected a tar at {url}, found {one_line(error)}") from error
    return path


def _list_tar(path: str) -> list[Entry]:
    """List one webdataset tar; only headers and the .cls members are read.

    Members of one key need not be neighbours. Images of one key share its label, or have one each, in order.
    """
    pictures: dict[str, list[Entry]] = {}
    labels: dict[str, list[int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                # webdataset's rule: the key ends at the first dot of the base name
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if f".{extension.lower()}" in EXTENSIONS:
                    entry = Entry(key, None, path, member.name, member.offset_data, member.size)
                    pictures.setdefault(key, []).append(entry)
                elif extension == "cls":
                    content = tar.extractfile(member)
                    text = content.read(64).strip() if content else b""
                    if not LABEL.fullmatch(text):
                        raise UserError(
                            f"images.source: expected a label from 0 to 999999999 in {path}:{member.name}, found {text!r}"
                        )
                    labels.setdefault(key, []).append(int(text))
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"images.source: expected an uncompressed tar, found {path}: {error}") from error
    entries = []
    for key, same_key in pictures.items():
        found = labels.get(key, [None])
        if len(found) not in (1, len(same_key)):
            expected = f"one label or {len(same_key)} for the key {key} in {path}"
            raise UserError(f"images.source: expected {expected}, found {len(found)}")
        entries += [replace(entry, label=label) for entry, label in zip(same_key, cycle(found))]
    return entries


def _list_dataset(source: str, split: str) -> tuple[list[Entry], list[str]]:
    """List the first column of images, with the first of class labels."""
    dataset = _dataset(source, split)
    labelled = "label" in dataset.column_names
    # The library marks rows without a label by -1.
    labels = [None if label == -1 else label for label in dataset["label"]] if labelled else [None] * len(dataset)
    classes = [] if all(label is None for label in labels) else list(dataset.features["label"].names)
    return [Entry(f"{row:09d}", label, source, split, row) for row, label in enumerate(labels)], classes


@lru_cache(maxsize=2)
def _dataset(source: str, split: str) -> Dataset:
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


def with_unique_keys(entries: list[Entry]) -> list[Entry]:
    """Make webdataset keys: without dots (a dot would split the key), no two alike. The first of a clash keeps its key."""
    taken: set[str] = set()
    last: Counter[str] = Counter()  # suffix given, so that many of one key do not try all suffixes again
    unique = []
    for entry in entries:
        wanted = key = entry.key.replace(".", "_")
        while key in taken:
            last[wanted] = max(last[wanted], 1) + 1
            key = f"{wanted}-{last[wanted]}"
        taken.add(key)
        unique.append(replace(entry, key=key))
    return unique


@lru_cache(maxsize=8)
def _zip(path: str, process: int) -> zipfile.ZipFile:
    """Open a zip, once per process: forked workers that shared a file position would read each other's bytes."""
    return zipfile.ZipFile(path)
