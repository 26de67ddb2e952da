"""The index of a source: a sequence of all its images that takes little memory, however many there are.

The index has one piece for each part of the source (pieces.py). With a folder, each piece is a file there: the first process
that needs it makes it, and the others map it. A part that has changed has another stamp, and so another piece. Without a
folder, the pieces are in memory. Image ``i`` is the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import UserError, one_line
from ..files import atomic_file, locked, this_process
from ..progress import progress
from .entries import Entry
from .keys import RepeatedKeys, find_repeated_keys
from .listings import UNLABELLED, Part, TarPart
from .pieces import Piece, Summary

VERSION = "index 1"
RUN_LENGTH = 100_000
"""Images that are shuffled as one unit, in sources other than tars."""


class ImageIndex(Sequence[Entry]):
    """Entries of all images of a source, in order. ``index[i]`` is made from the columns when it is needed.

    Attributes:
        starts: index of the first image of each part, and the number of all images at the end.
        classes: class names; [] if no image has a label.
    """

    def __init__(self, parts: Sequence[Part], pieces: Pieces) -> None:
        self.parts, self.pieces = parts, pieces
        self.summaries = pieces.summaries(parts)
        self.starts = np.concatenate([[0], np.cumsum([each.count for each in self.summaries], dtype=np.int64)])
        self.repeated = pieces.repeated(self)
        self.classes: list[str] = []
        self._class_numbers: list[np.ndarray | None] = [None] * len(parts)  # from a part's class numbers to the source's

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        part, piece, row = self._find(index)
        name, label, offset, size = piece.row(row)
        key = self.repeated.renamed(index, self.parts[part].key(name))
        return self.parts[part].entry(key, name, self._label(part, label), offset, size)

    def __iter__(self) -> Iterator[Entry]:
        return (self[index] for index in range(len(self)))

    def _find(self, index: int) -> tuple[int, Piece, int]:
        """Return the part that an image is in, the piece of that part, and the image's row in the piece."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, self.pieces.open(self.parts[part]), index - int(self.starts[part])

    def key(self, index: int) -> str:
        """Return the key of an image, before repeated keys are renamed."""
        part, piece, row = self._find(index)
        return self.parts[part].key(piece.name(row))

    def _label(self, part: int, label: int) -> int | None:
        if label == UNLABELLED:
            return None
        numbers = self._class_numbers[part]
        return label if numbers is None else int(numbers[label])

    def hashes(self) -> Iterator[np.ndarray]:
        """Yield the hashes of the keys of each part, before repeated keys are renamed."""
        return (self.pieces.open(part).hashes for part in self.parts)

    def shuffle_unit_counts(self) -> np.ndarray:
        """Return the number of images in each unit of shuffling: a tar, or a run of consecutive images of another source."""
        if all(isinstance(part, TarPart) for part in self.parts):
            return np.diff(self.starts)
        return np.diff(np.append(np.arange(0, len(self), RUN_LENGTH), len(self)))

    @property
    def images_sha256(self) -> str:
        """Hash of the names, labels, sizes and order of the images, whatever the folder they are in."""
        return joined_sha256(each.pictures for each in self.summaries if each.count)

    def files_sha256(self, contents: bool = False) -> str:
        """Hash the images by the sizes and modification times of their files, or by their contents."""
        if not contents:
            return joined_sha256(each.pictures + each.files for each in self.summaries if each.count)
        return joined_sha256(content_sha256(entry) for entry in self)

    def name_classes(self, names_by_number: list[str] | None) -> None:
        """Set ``classes`` to ``names_by_number``; None: to the class names of the parts. Raises UserError for a label without a
        name."""
        own = [each.classes for each in self.summaries]
        if names_by_number is None:
            names = own[0] if len(own) == 1 else sorted({name for found in own for name in found or []})
            numbers = {name: number for number, name in enumerate(names or [])}
            self._class_numbers = [np.array([numbers[name] for name in found or []], np.int64) for found in own]
            self.classes = list(names or [])
        else:
            self.classes = names_by_number
        if self.classes:
            self._check_labels(own_names=names_by_number is None)

    def _check_labels(self, own_names: bool) -> None:
        for part, summary in enumerate(self.summaries):
            maximum = summary.highest if own_names else len(self.classes) - 1
            if summary.count and summary.highest > maximum:
                labels = self.pieces.open(self.parts[part]).labels
                wrong = int(np.flatnonzero(labels > maximum)[0])
                first = self[int(self.starts[part]) + wrong]
                raise UserError(
                    f"images.source: expected a label from 0 to {len(self.classes) - 1} ({len(self.classes)} classes), "
                    f"found {first.label} for {first.name} (key {first.key})"
                )

    @property
    def highest_label(self) -> int:
        """Highest label; UNLABELLED if no image has one."""
        return max((each.highest for each in self.summaries), default=UNLABELLED)

    def unlabelled(self) -> tuple[int, Entry | None]:
        """Return the number of images without a label, and the first of them."""
        count, first = 0, None
        for part, summary in enumerate(self.summaries):
            if summary.count and summary.lowest == UNLABELLED:
                rows = np.flatnonzero(self.pieces.open(self.parts[part]).labels == UNLABELLED)
                count += len(rows)
                first = first or self[int(self.starts[part] + rows[0])]
        return count, first

    def count_labels(self) -> int:
        """Return the number of distinct labels. Reads the piece of every part."""
        labels = [np.unique(self.pieces.open(part).labels) for part in self.parts]
        return int((np.unique(np.concatenate(labels)) != UNLABELLED).sum())


class Pieces:
    """The pieces of an index, in memory."""

    def __init__(self) -> None:
        self._made: dict[Part, Piece] = {}

    def summaries(self, parts: Sequence[Part]) -> list[Summary]:
        return [self.open(part).summary for part in parts]

    def open(self, part: Part) -> Piece:
        if part not in self._made:
            self._made[part] = make_piece(part)
        return self._made[part]

    def repeated(self, index: ImageIndex) -> RepeatedKeys:
        return find_repeated_keys(index)


class PiecesOnDisk(Pieces):
    """The pieces of an index, in a folder that processes and machines share.

    Args:
        worker: (i, n): this is process i of n. Each begins at another part.
    """

    def __init__(self, folder: Path, worker: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        self.folder, self.worker = folder, worker
        self.names: dict[Part, str] = {}
        self.digest: str | None = None

    def summaries(self, parts: Sequence[Part]) -> list[Summary]:
        """Return the summaries of all pieces. Makes missing pieces, unless all summaries were saved before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names = {part: self._name(part, part.stamp()) for part in parts}
        self.digest = joined_sha256(self.names.values())[:32]
        path = self.folder / f"index-{self.digest}.json"
        with suppress(OSError, ValueError, TypeError):
            return [Summary(**each) for each in json.loads(path.read_text(encoding="utf-8"))]
        self._make(parts)
        found = [self.open(part).summary for part in parts]
        with atomic_file(path, this_process()) as temporary:
            temporary.write_text(json.dumps([vars(each) for each in found]), encoding="utf-8")
        return found

    def open(self, part: Part) -> Piece:
        try:
            return Piece.load(self.folder / self.names[part])
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = f"{self.names[part]}: {one_line(error)}; remove it"
            raise UserError(f"images.source: expected an intact index in {self.folder}, found {found}") from error

    def repeated(self, index: ImageIndex) -> RepeatedKeys:
        """Find the repeated keys, or load those that another process has found."""
        path = self.folder / f"repeated-{self.digest}.safetensors"
        with suppress(OSError, ValueError, KeyError):
            return RepeatedKeys.load(path)
        with locked(path.with_suffix(".lock")):
            with suppress(OSError, ValueError, KeyError):
                return RepeatedKeys.load(path)
            for left in self.folder.glob(".keys-*"):  # by a killed process that held the lock
                shutil.rmtree(left, ignore_errors=True)
            found = find_repeated_keys(index, self.folder)
            found.save(path)
        return found

    def _name(self, part: Part, stamp: str | None) -> str:
        piece = None
        if stamp is None:
            piece = make_piece(part)
            stamp = piece.summary.pictures + piece.summary.files
        name = f"piece-{joined_sha256([VERSION, type(part).__name__, part.name, stamp])[:32]}.safetensors"
        if piece is not None and not (self.folder / name).is_file():
            piece.save(self.folder / name)
        return name

    def _make(self, parts: Sequence[Part]) -> None:
        worker, workers = self.worker
        begin = worker * len(parts) // workers
        missing = [part for part in (*parts[begin:], *parts[:begin]) if not (self.folder / self.names[part]).is_file()]
        with progress(len(missing), 0, "list", unit="part", disable=len(missing) < 2) as bar:
            # First make what no other process is making. Then wait for the others, which may have been killed.
            for wait in (False, True):
                for part in missing:
                    if self._make_one(part, wait):
                        bar.update(1)

    def _make_one(self, part: Part, wait: bool) -> bool:
        path = self.folder / self.names[part]
        if path.is_file():
            return False
        with locked(path.with_suffix(".lock"), wait) as held:
            if held and not path.is_file():
                make_piece(part).save(path)
            return held


def make_piece(part: Part) -> Piece:
    stamp = part.stamp()
    try:
        return Piece.of(part.listing(), stamp, part.key)
    except OSError as error:
        raise UserError(f"images.source: expected to read {part.name}, found {error}") from error


def content_sha256(entry: Entry) -> str:
    try:
        return hashlib.sha256(entry.read()).hexdigest()
    except Exception as error:  # encoding will skip it and list it
        return type(error).__name__


def joined_sha256(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
