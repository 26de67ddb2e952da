"""Image sources: a folder, a zip of one, webdataset tars here or in a store, or a Hugging Face dataset, listed alike.

A source is listed in sorted order, without decoding anything: image ``i`` is the same for any number of processes.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import braceexpand
from webdataset.gopen import gopen

from ..errors import UserError, one_line
from ..files import atomic_file, this_process
from . import store
from .entries import EXTENSIONS, HUGGING_FACE, RemoteTar
from .index import PictureIndex, Pieces, PiecesOnDisk
from .listings import UNLABELLED, DatasetPart, Part, RemoteTarPart, TarPart, folder_parts, zip_part
from .settings import ImagesConfig

CHUNK_BYTES = 2**20
PATTERN = re.compile(r"[*?\[]")
REQUESTS_AT_ONCE = 16
UNNAMED_CLASSES = 1_000
"""Labels without a list of names may leave out classes if there are at most so many; otherwise a tenth must occur."""
NUMBER_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
MOST_TARS = 1_000_000
"""Most tars that braces may stand for."""


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


def source_parts(config: ImagesConfig) -> tuple[list[Part], list[Part]]:
    """Return the parts of a source, and again those that are tars."""
    source = config.source
    if not (source.startswith(HUGGING_FACE) or source.endswith(".zip") or Path(source).is_dir()):
        tars = tar_parts(source, config)
        return tars, tars
    if config.classes is not None:
        raise UserError(f"images.classes: expected null, {source} names its classes itself, found {config.classes}")
    if source.startswith(HUGGING_FACE):
        return [DatasetPart(source, config.split)], []
    return (folder_parts(Path(source)) if Path(source).is_dir() else [zip_part(source)]), []


def numbered_classes(index: PictureIndex, config: ImagesConfig, first_tar: Part) -> list[str]:
    """Names of the classes whose numbers tars have; [] where no picture has one."""
    labels = index.labels() - {UNLABELLED}
    classes_file = config.classes or f"{first_tar.path.rpartition('/')[0] or '.'}/classes.json"
    content = read_file(classes_file)
    if content is not None:
        try:
            classes = json.loads(content)
        except ValueError:
            classes = None
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"images.classes: expected a JSON list of class names, found something else in {classes_file}")
    elif config.classes:
        raise UserError(f"images.classes: expected a JSON list of class names, found no file {classes_file}")
    else:
        classes = _unnamed_classes(labels, classes_file)
    return classes if labels else []


def read_file(path: str) -> bytes | None:
    """Return the contents of a small file, here or in a store; None where there is none."""
    try:
        return store.read_bytes(path, "images.classes") if store.is_remote(path) else Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None


def tar_parts(pattern: str, config: ImagesConfig) -> list[Part]:
    """List the tars that a pattern stands for, here or in a store."""
    if pattern.startswith("pipe:"):  # a shell command may have braces of its own
        return [TarPart(str(_run_pipe(pattern, config)))]
    parts: list[Part] = []
    expanded = _expand_braces(pattern)
    if store.is_remote(pattern):
        store.require_no_credentials(pattern, "images.source")
        cache, limit = f"{config.cache}/tars", int(config.cache_gigabytes * 1e9)
        for found in remote_tars(expanded):
            parts.append(RemoteTarPart(found.url, RemoteTar(found.url, found.size, found.stamp, cache, limit)))
    else:
        parts += [TarPart(path) for each in expanded for path in sorted(glob.glob(each))]
    if not parts:
        raise UserError(f"images.source: expected a folder, a .zip or webdataset tars, found nothing at {pattern}")
    return parts


def remote_tars(urls: list[str]) -> list[store.Stat]:
    """Find the tars of URLs, whose names may have * and ?. A folder with several is listed, which is one request for many."""
    folders: dict[str, list[str]] = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        folders.setdefault(folder, []).append(name)
    found: list[store.Stat] = []
    for folder, names in folders.items():
        patterns = [name for name in names if PATTERN.search(name)]
        if patterns or (len(names) > 1 and not folder.startswith("http")):  # few web servers list a folder
            there = store.listed(folder, "images.source")
            matching = {name: [each for each in there if fnmatch.fnmatchcase(each.name, name)] for name in patterns}
            known = {each.name: each for each in there}
            for name in names:
                found += matching[name] if name in matching else [known[name]] if name in known else _missing(folder, name)
        else:
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                wanted = [store.joined(folder, name) for name in names]
                for name, each in zip(names, pool.map(lambda url: store.stat(url, "images.source"), wanted)):
                    found += [each] if each is not None else _missing(folder, name)
    return found


def _missing(folder: str, name: str) -> list[store.Stat]:
    raise UserError(f"images.source: expected a tar at {store.shown(store.joined(folder, name))}, found none")


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


def _unnamed_classes(labels: set[int], classes_file: str) -> list[str]:
    """Name classes by number, 0 to the highest label: the same for parts of a set that leave out some. A stray label must not
    make a list of a billion."""
    count = max(labels, default=-1) + 1
    if count > UNNAMED_CLASSES and count > 10 * len(labels):
        raise UserError(
            f"images.classes: expected a JSON list of class names for {len(labels)} different labels up to {count - 1}, "
            f"found no file {classes_file}"
        )
    return [str(label) for label in range(count)]


def _run_pipe(command: str, config: ImagesConfig) -> Path:
    """Keep the tar that a shell command prints in ``config.cache``, once, and return its path."""
    if not config.allow_pipe:
        found = f"a shell command, {command!r}; images.allow_pipe=true has it run"
        raise UserError(f"images.source: expected files or URLs, found {found}")
    path = Path(config.cache).expanduser() / f"{hashlib.sha256(command.encode()).hexdigest()[:16]}-pipe.tar"
    if path.is_file():
        print(f"{command}: the copy of an earlier run, {path}", file=sys.stderr)
        return path
    print(f"fetching {command}", file=sys.stderr)
    try:
        with atomic_file(path, this_process()) as temporary, gopen(command) as stream, open(temporary, "wb") as file:
            while chunk := stream.read(CHUNK_BYTES):
                file.write(chunk)
            stream.close()  # raises where the command did not end well
    except OSError as error:
        raise UserError(f"images.source: expected a tar from {command}, found {one_line(error)}") from error
    return path
