"""Image sources: a folder, a zip of one, webdataset tars on disk or in an object store, or a Hugging Face dataset.

A source is listed in sorted order, without decoding any image. Image ``i`` is the same for any number of processes.
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
from .index import ImageIndex, Pieces, PiecesOnDisk
from .listings import UNLABELLED, DatasetPart, Part, RemoteTarPart, TarPart, folder_parts, zip_part
from .settings import ImagesConfig

CHUNK_BYTES = 2**20
PATTERN = re.compile(r"[*?\[]")
CONCURRENT_REQUESTS = 16
MAX_UNNAMED_CLASSES = 1_000
"""Beyond this many classes without a list of names, at least a tenth of the labels must occur."""
NUMBER_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
MAX_TARS = 1_000_000
"""Maximum number of tars that braces may expand to."""


def list_images(config: ImagesConfig, folder: Path | None = None, worker: tuple[int, int] = (0, 1)) -> ImageIndex:
    """List all images of the source in sorted order.

    Args:
        folder: folder of the index, shared with other processes. None keeps the index in memory.
        worker: (i, n): this is process i of n.

    Raises UserError if the source is missing or empty, or a label is outside the classes.
    """
    parts, tars = source_parts(config)
    index = ImageIndex(parts, Pieces() if folder is None else PiecesOnDisk(folder, worker))
    if not len(index):
        raise UserError(f"images.source: expected images ({', '.join(sorted(EXTENSIONS))}), found none in {config.source}")
    index.name_classes(tar_class_names(index, config, tars[0]) if tars else None)
    return index


def source_parts(config: ImagesConfig) -> tuple[list[Part], list[Part]]:
    """Return all parts of a source, and those of them that are tars."""
    source = config.source
    if not (source.startswith(HUGGING_FACE) or source.endswith(".zip") or Path(source).is_dir()):
        tars = tar_parts(source, config)
        return tars, tars
    if config.classes is not None:
        raise UserError(f"images.classes: expected null, {source} names its classes itself, found {config.classes}")
    if source.startswith(HUGGING_FACE):
        return [DatasetPart(source, config.split)], []
    return (folder_parts(Path(source)) if Path(source).is_dir() else [zip_part(source)]), []


def tar_class_names(index: ImageIndex, config: ImagesConfig, first_tar: Part) -> list[str]:
    """Return the names of the classes whose numbers are in the tars; [] if no image has a label."""
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
        classes = _numbers_as_names(index, classes_file)
    return classes if index.highest_label != UNLABELLED else []


def read_file(path: str) -> bytes | None:
    """Return the contents of a small file, on disk or in a store; None if it does not exist."""
    try:
        return store.read_bytes(path, "images.classes") if store.is_remote(path) else Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None


def tar_parts(pattern: str, config: ImagesConfig) -> list[Part]:
    """List the tars that match a pattern, on disk or in a store."""
    if pattern.startswith("pipe:"):  # the braces of a shell command are its own
        return [TarPart(str(_run_pipe(pattern, config)))]
    parts: list[Part] = []
    expanded = _expand_braces(pattern)
    if store.is_remote(pattern):
        store.require_no_credentials(pattern, "images.source")
        cache, limit = f"{config.cache}/tars", int(config.cache_gigabytes * 1e9)
        for found in find_remote_tars(expanded):
            parts.append(RemoteTarPart(found.url, RemoteTar(found.url, found.size, found.stamp, cache, limit)))
    else:
        parts += [TarPart(path) for each in expanded for path in sorted(glob.glob(each))]
    if not parts:
        raise UserError(f"images.source: expected a folder, a .zip or webdataset tars, found nothing at {pattern}")
    return parts


def find_remote_tars(urls: list[str]) -> list[store.Stat]:
    """Find the tars at URLs whose names may contain * and ?. Lists a folder with several of them, to save requests."""
    folders: dict[str, list[str]] = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        folders.setdefault(folder, []).append(name)
    found: list[store.Stat] = []
    for folder, names in folders.items():
        patterns = [name for name in names if PATTERN.search(name)]
        if patterns or (len(names) > 1 and not folder.startswith("http")):  # few web servers list a folder
            existing = store.list_files(folder, "images.source")
            matching = {name: [each for each in existing if fnmatch.fnmatchcase(each.name, name)] for name in patterns}
            known = {each.name: each for each in existing}
            for name in names:
                found += matching[name] if name in matching else [known[name]] if name in known else _missing(folder, name)
        else:
            with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
                wanted = [store.join(folder, name) for name in names]
                for name, each in zip(names, pool.map(lambda url: store.stat(url, "images.source"), wanted)):
                    found += [each] if each is not None else _missing(folder, name)
    return found


def _missing(folder: str, name: str) -> list[store.Stat]:
    raise UserError(f"images.source: expected a tar at {store.without_credentials(store.join(folder, name))}, found none")


def _expand_braces(pattern: str) -> list[str]:
    """Expand braces, as in train-{000..009}.tar."""
    # braceexpand makes a list of all names, so too many must be refused before.
    lengths = [abs(float(last) - float(first)) + 1 for first, last in NUMBER_RANGE.findall(pattern)]
    if math.prod(lengths) > MAX_TARS:
        raise UserError(f"images.source: expected braces for at most {MAX_TARS:,} tars, found more in {pattern!r}")
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"images.source: expected balanced braces, found {pattern!r}: {one_line(error)}") from error


def _numbers_as_names(index: ImageIndex, classes_file: str) -> list[str]:
    """Name the classes by number, from 0 to the highest label, so that subsets of a dataset get the same names.

    Raises UserError if few of the numbers occur: one stray label could make a list of a billion names.
    """
    count = index.highest_label + 1
    if count > MAX_UNNAMED_CLASSES and count > 10 * (distinct := index.count_labels()):
        raise UserError(
            f"images.classes: expected a JSON list of class names for {distinct} different labels up to {count - 1}, "
            f"found no file {classes_file}"
        )
    return [str(label) for label in range(count)]


def _run_pipe(command: str, config: ImagesConfig) -> Path:
    """Run a shell command, once, and return the path of the tar it prints, in ``config.cache``."""
    if not config.allow_pipe:
        found = f"a shell command, {command!r}; images.allow_pipe=true allows it"
        raise UserError(f"images.source: expected files or URLs, found {found}")
    path = Path(config.cache).expanduser() / f"{hashlib.sha256(command.encode()).hexdigest()[:16]}-pipe.tar"
    if path.is_file():
        print(f"{command}: using the copy of an earlier run, {path}", file=sys.stderr)
        return path
    print(f"fetching {command}", file=sys.stderr)
    try:
        with atomic_file(path, this_process()) as temporary, gopen(command) as stream, open(temporary, "wb") as file:
            while chunk := stream.read(CHUNK_BYTES):
                file.write(chunk)
            stream.close()  # raises if the command failed
    except OSError as error:
        raise UserError(f"images.source: expected a tar from {command}, found {one_line(error)}") from error
    return path
