"""The index of a source: all its pictures as a sequence that takes hardly any memory, whatever their number.

Each part of the source has a piece (pieces.py). In a folder of index files a piece is made once, by whichever process comes
first, and mapped by all others; a part that was changed has another stamp, and so another piece. Without a folder, the pieces
are in memory. Image ``i`` is the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import UserError, one_line
from ..files import atomic_file, locked, this_process
from ..progress import progress
from .entries import Entry
from .keys import Repeated, find_repeated
from .listings import UNLABELLED, Part, TarPart
from .pieces import Piece, Summary

VERSION = "index 1"
RUN = 100_000


class PictureIndex(Sequence[Entry]):
    """Entries of all pictures of the parts, in order; ``index[i]`` reads one from the columns.

    Attributes:
        starts: of each part, the number of its first picture; and at the end, of all.
        classes: names; [] where no picture has a label.
    """

    def __init__(self, parts: Sequence[Part], pieces: Pieces) -> None:
        self.parts, self.pieces = parts, pieces
        self.summaries = pieces.summaries(parts)
        self.starts = np.concatenate([[0], np.cumsum([each.count for each in self.summaries], dtype=np.int64)])
        self.repeated = pieces.repeated(self)
        self.classes: list[str] = []
        self._labels: list[np.ndarray | None] = [None] * len(parts)  # of this source, for those of a part that names its own

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number = int(number) % len(self)
        part, piece, place = self._find(number)
        name, label, offset, size = piece.row(place)
        key = self.repeated.renamed(number, self.parts[part].key(name))
        return self.parts[part].entry(key, name, self._label(part, label), offset, size)

    def __iter__(self) -> Iterator[Entry]:
        return (self[number] for number in range(len(self)))

    def _find(self, number: int) -> tuple[int, Piece, int]:
        """Return the part of a picture, its piece, and the picture's place in it."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, self.pieces.open(self.parts[part]), number - int(self.starts[part])

    def key(self, number: int) -> str:
        """Return the key of a picture, before repeated ones are renamed."""
        part, piece, place = self._find(number)
        return self.parts[part].key(piece.name(place))

    def _label(self, part: int, label: int) -> int | None:
        if label == UNLABELLED:
            return None
        known = self._labels[part]
        return label if known is None else int(known[label])

    def hashes(self) -> Iterator[np.ndarray]:
        """Yield the hashes of the keys of each part, before repeated ones are renamed."""
        return (self.pieces.open(part).hashes for part in self.parts)

    def mixed_counts(self) -> np.ndarray:
        """Return the pictures of each part that is mixed as a whole: tars, or runs of any other source."""
        if all(isinstance(part, TarPart) for part in self.parts):
            return np.diff(self.starts)
        return np.diff(np.append(np.arange(0, len(self), RUN), len(self)))

    @property
    def pictures_sha256(self) -> str:
        """Changes with the names, labels, sizes and order of the pictures, and not where they lie."""
        return joined_sha256(each.pictures for each in self.summaries if each.count)

    def files_sha256(self, contents: bool = False) -> str:
        """Changes when a picture does: by the sizes and modification times of files, or by their contents."""
        if not contents:
            return joined_sha256(each.pictures + each.files for each in self.summaries if each.count)
        return joined_sha256(contents_of(entry) for entry in self)

    def name_classes(self, numbered: list[str] | None) -> None:
        """Set ``classes``: those that the parts name themselves, or ``numbered``. Raises UserError for a label without one."""
        own = [each.classes for each in self.summaries]
        if numbered is None:
            names = own[0] if len(own) == 1 else sorted({name for found in own for name in found or []})
            numbers = {name: number for number, name in enumerate(names or [])}
            self._labels = [np.array([numbers[name] for name in found or []], np.int64) for found in own]
            self.classes = list(names or [])
        else:
            self.classes = numbered
        if self.classes:
            self._check_labels(own_names=numbered is None)

    def _check_labels(self, own_names: bool) -> None:
        for part, summary in enumerate(self.summaries):
            most = summary.highest if own_names else len(self.classes) - 1
            if summary.count and (summary.lowest == UNLABELLED or summary.highest > most):
                labels = self.pieces.open(self.parts[part]).labels
                wrong = int(np.flatnonzero((labels == UNLABELLED) | (labels > most))[0])
                first = self[int(self.starts[part]) + wrong]
                raise UserError(
                    f"images.source: expected a label from 0 to {len(self.classes) - 1} ({len(self.classes)} classes), "
                    f"found {first.label} for {first.name} (key {first.key})"
                )

    @property
    def highest_label(self) -> int:
        """UNLABELLED where no picture has a label."""
        return max((each.highest for each in self.summaries), default=UNLABELLED)

    def count_labels(self) -> int:
        """Return the number of different labels; reads the index of every part."""
        labels = [np.unique(self.pieces.open(part).labels) for part in self.parts]
        return int((np.unique(np.concatenate(labels)) != UNLABELLED).sum())


class Pieces:
    """The pieces of a source, in memory."""

    def __init__(self) -> None:
        self._made: dict[Part, Piece] = {}

    def summaries(self, parts: Sequence[Part]) -> list[Summary]:
        return [self.open(part).summary for part in parts]

    def open(self, part: Part) -> Piece:
        if part not in self._made:
            self._made[part] = make_piece(part)
        return self._made[part]

    def repeated(self, index: PictureIndex) -> Repeated:
        return find_repeated(index)


class PiecesOnDisk(Pieces):
    """The pieces of a source, in a folder that processes and machines share.

    Args:
        turn: this process and their number: they begin at different parts.
    """

    def __init__(self, folder: Path, turn: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        self.folder, self.turn = folder, turn
        self.names: dict[Part, str] = {}
        self.whole: str | None = None

    def summaries(self, parts: Sequence[Part]) -> list[Summary]:
        """Make the pieces that are missing, or load the summaries of all, if all of these parts are known."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names = {part: self._name(part, part.stamp()) for part in parts}
        self.whole = joined_sha256(self.names.values())[:32]
        path = self.folder / f"index-{self.whole}.json"
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
            raise UserError(f"images.source: expected a whole index in {self.folder}, found {found}") from error

    def repeated(self, index: PictureIndex) -> Repeated:
        """Find them, or load what another process has found."""
        path = self.folder / f"repeated-{self.whole}.safetensors"
        with suppress(OSError, ValueError, KeyError):
            return Repeated.load(path)
        with locked(path.with_suffix(".lock")):
            with suppress(OSError, ValueError, KeyError):
                return Repeated.load(path)
            found = find_repeated(index)
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
        process, processes = self.turn
        begin = process * len(parts) // processes
        missing = [part for part in (*parts[begin:], *parts[:begin]) if not (self.folder / self.names[part]).is_file()]
        with progress(len(missing), 0, "list", unit="part", disable=len(missing) < 2) as bar:
            for wait in (False, True):  # first what nobody does; then what others have begun, and perhaps not finished
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


def contents_of(entry: Entry) -> str:
    try:
        return hashlib.sha256(entry.read()).hexdigest()
    except Exception as error:  # it will be skipped, and listed
        return type(error).__name__


def joined_sha256(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
