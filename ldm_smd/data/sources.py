"""Image sources: a folder, a zip of one, webdataset tars here or at a URL, or a Hugging Face dataset, listed alike.

A source is listed in sorted order, without decoding anything: image ``i`` is the same for any number of processes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
import sys
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import braceexpand
from webdataset.gopen import Pipe, gopen, gopen_schemes

from ..errors import UserError, one_line
from ..files import atomic_file, this_process
from .entries import EXTENSIONS, HUGGING_FACE
from .index import PictureIndex, Pieces, PiecesOnDisk
from .listings import UNLABELLED, DatasetPart, Part, TarPart, folder_parts, zip_part
from .settings import ImagesConfig

CHUNK_BYTES = 2**20
UNNAMED_CLASSES = 1_000
"""Labels without a list of names may leave out classes if there are at most so many; otherwise a tenth must occur."""
NUMBER_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
MOST_TARS = 1_000_000
"""Most tars that braces may stand for."""

# As webdataset reads gs:// with gsutil; 1.0 has nothing for s3://.
gopen_schemes.setdefault("s3", lambda url, mode, bufsize: Pipe(["aws", "s3", "cp", url, "-"], mode=mode, bufsize=bufsize))


def list_pictures(config: ImagesConfig, folder: Path | None = None, turn: tuple[int, int] = (0, 1)) -> PictureIndex:
    """List all images of the source in sorted order.

    Args:
        folder: where the index is kept and shared with other processes; None keeps it in memory.
        turn: this process and their number.

    Raises UserError where the source is missing or empty, or a label lies outside the classes.
    """
    parts, tars = source_parts(config)
    index = PictureIndex(parts, Pieces() if folder is None else PiecesOnDisk(folder, turn))
    if not len(index):
        raise UserError(f"images.source: expected pictures ({', '.join(sorted(EXTENSIONS))}), found none in {config.source}")
    index.name_classes(numbered_classes(index, config, tars[0]) if tars else None)
    return index


def source_parts(config: ImagesConfig) -> tuple[list[Part], list[str]]:
    """Return the parts of a source, and its tars, if that is what it is."""
    source = config.source
    if not (source.startswith(HUGGING_FACE) or source.endswith(".zip") or Path(source).is_dir()):
        tars = tar_paths(source, config)
        return [TarPart(path) for path in tars], tars
    if config.classes is not None:
        raise UserError(f"images.classes: expected null, {source} names its classes itself, found {config.classes}")
    if source.startswith(HUGGING_FACE):
        return [DatasetPart(source, config.split)], []
    return (folder_parts(Path(source)) if Path(source).is_dir() else [zip_part(source)]), []


def numbered_classes(index: PictureIndex, config: ImagesConfig, first_tar: str) -> list[str]:
    """Names of the classes whose numbers tars have; [] where no picture has one."""
    labels = index.labels() - {UNLABELLED}
    classes_file = Path(config.classes) if config.classes else Path(first_tar).parent / "classes.json"
    if classes_file.is_file():
        classes = json.loads(classes_file.read_text(encoding="utf-8"))
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"images.classes: expected a JSON list of class names, found something else in {classes_file}")
    elif config.classes:
        raise UserError(f"images.classes: expected a JSON list of class names, found no file {classes_file}")
    else:
        classes = _unnamed_classes(labels, classes_file)
    return classes if labels else []


def tar_paths(pattern: str, config: ImagesConfig) -> list[str]:
    """List the tars that a pattern stands for; those at URLs are fetched."""
    paths: list[str] = []
    # A shell command may have braces of its own.
    for expanded in [pattern] if pattern.startswith("pipe:") else _expand_braces(pattern):
        remote = expanded.startswith("pipe:") or urlsplit(expanded).scheme in gopen_schemes
        paths += [str(_fetch(expanded, config))] if remote else sorted(glob.glob(expanded))
    if not paths:
        raise UserError(f"images.source: expected a folder, a .zip or webdataset tars, found nothing at {pattern}")
    return paths


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
