"""Picture sources: a folder, a zip of one, or webdataset tars, as one map-style dataset; and the one crop and resize.

A source is listed once, in sorted order, without decoding anything, so that picture ``i`` is the same for any number of
workers or processes. Decoding happens in DataLoader workers, a batch each. A picture that cannot be read does not raise
there, so that the caller counts it, lists it, or stops.
"""

from __future__ import annotations

import glob
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

import braceexpand
import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch.utils.data import DataLoader, Dataset

from ..config import ImagesConfig
from ..errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Entry:
    """Where one encoded picture lies: ``size`` bytes at ``offset`` of ``path``, the whole file where ``size`` is None, or
    the zip member ``member``."""

    key: str
    label: int | None
    path: str
    member: str | None = None
    offset: int = 0
    size: int | None = None

    @property
    def name(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path

    def read(self) -> bytes:
        if self.path.endswith(".zip"):
            return _zip(self.path, os.getpid()).read(self.member)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


@dataclass
class Pictures:
    """A batch: ``pixels`` uint8 (b, 3, R, R), and of each its key and label. What could not be read stands apart, as dicts
    with name and reason."""

    pixels: torch.Tensor
    keys: list[str]
    labels: list[int | None]
    unreadable: list[dict]

    def pin_memory(self) -> Pictures:
        return replace(self, pixels=self.pixels.pin_memory())


# ---------------------------------------------------------------------------------------------------------------------
# Listing


def list_entries(config: ImagesConfig) -> tuple[list[Entry], list[str]]:
    """All pictures of the source in sorted order, and the class names ([] where the source has no labels).

    Raises UserError where the source is missing or empty, or a label lies outside the classes.
    """
    source = config.source
    if Path(source).is_dir():
        entries, classes = _list_folder(Path(source))
    elif source.endswith(".zip"):
        entries, classes = _list_zip(Path(source))
    else:
        entries, classes = _list_tars(source, config.classes)
    if not entries:
        raise UserError(f"images.source: expected pictures ({', '.join(sorted(EXTENSIONS))}), found none in {source}")
    if classes:
        for entry in entries:
            if entry.label is None or not 0 <= entry.label < len(classes):
                raise UserError(
                    f"images.source: expected a label from 0 to {len(classes) - 1} ({len(classes)} classes), "
                    f"found {entry.label} for {entry.name} (key {entry.key})"
                )
    return _with_unique_keys(entries), classes


def _list_folder(folder: Path) -> tuple[list[Entry], list[str]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    labels, classes = _labels_from_folders(names)
    return [Entry(_key(n), label, str(p)) for n, label, p in zip(names, labels, paths)], classes


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
    labels, classes = _labels_from_folders(members)
    return [Entry(_key(m), label, str(path), member=m) for m, label in zip(members, labels)], classes


def _labels_from_folders(names: list[str]) -> tuple[list[int | None], list[str]]:
    """Class = first folder of each name. Pictures that all lie at the top have no labels."""
    tops = [PurePosixPath(name).parts[0] if "/" in name else None for name in names]
    classes = sorted({top for top in tops if top is not None})
    if not classes:
        return [None] * len(names), []
    return [classes.index(top) if top is not None else None for top in tops], classes


def _list_tars(pattern: str, classes_path: str | None) -> tuple[list[Entry], list[str]]:
    paths = [path for expanded in braceexpand.braceexpand(pattern) for path in sorted(glob.glob(expanded))]
    if not paths:
        raise UserError(f"images.source: expected a folder, a .zip or webdataset tars, found nothing at {pattern}")
    entries = [entry for path in paths for entry in _list_tar(path)]
    classes_file = Path(classes_path) if classes_path else Path(paths[0]).parent / "classes.json"
    if classes_file.is_file():
        classes = json.loads(classes_file.read_text(encoding="utf-8"))
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"images.classes: expected a JSON list of class names, found something else in {classes_file}")
    elif classes_path:
        raise UserError(f"images.classes: expected a JSON list of class names, found no file {classes_file}")
    elif any(entry.label is not None for entry in entries):
        highest = max(entry.label for entry in entries if entry.label is not None)
        classes = [str(label) for label in range(highest + 1)]
    else:
        classes = []
    if all(entry.label is None for entry in entries):
        classes = []
    return entries, classes


def _list_tar(path: str) -> list[Entry]:
    """Entries of one webdataset tar; only headers and the .cls members are read."""
    pictures: dict[str, Entry] = {}
    labels: dict[str, int] = {}
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
                    pictures[key] = Entry(key, None, path, member.name, member.offset_data, member.size)
                elif extension == "cls":
                    text = tar.extractfile(member).read(64).strip()
                    try:
                        labels[key] = int(text)
                    except ValueError:
                        raise UserError(f"images.source: expected an integer in {path}:{member.name}, found {text!r}") from None
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"images.source: expected an uncompressed tar, found {path}: {error}") from error
    return [Entry(e.key, labels.get(key), e.path, e.member, e.offset, e.size) for key, e in pictures.items()]


def _key(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _with_unique_keys(entries: list[Entry]) -> list[Entry]:
    """Webdataset keys: no dots (a dot would split the key), no two alike. The first of a clash keeps its key."""
    taken: set[str] = set()
    unique = []
    for entry in entries:
        wanted = key = entry.key.replace(".", "_")
        number = 2
        while key in taken:
            key = f"{wanted}-{number}"
            number += 1
        taken.add(key)
        unique.append(Entry(key, entry.label, entry.path, entry.member, entry.offset, entry.size))
    return unique


@lru_cache(maxsize=8)
def _zip(path: str, process: int) -> zipfile.ZipFile:
    """An open zip, one per process: forked workers that shared a file position would read each other's bytes."""
    return zipfile.ZipFile(path)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any PIL picture as 8-bit RGB: first frame, EXIF orientation applied, transparency composited on ``background``,
    16-bit greys scaled (not clipped), CMYK and palettes converted."""
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey; PIL's own conversion to 8 bits clips at 255
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257.0).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, ImageColor.getrgb(background))
        canvas.alpha_composite(rgba)
        image = canvas
    return image.convert("RGB")


def decode(data: bytes, config: ImagesConfig) -> torch.Tensor:
    """An encoded picture as uint8 (3, R, R), cropped and resized. Raises whatever PIL raises for a broken one."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.width * image.height
        if pixels > config.max_pixels:
            raise ValueError(f"{pixels} pixels, more than images.max_pixels={config.max_pixels}")
        image.load()
        rgb = to_rgb(image, config.background)
    size = (config.resolution, config.resolution)
    # Both scale with PIL's area-aware filter, so a large picture does not alias.
    if config.crop == "center":
        square = ImageOps.fit(rgb, size, Image.Resampling.LANCZOS)
    else:
        square = ImageOps.pad(rgb, size, Image.Resampling.LANCZOS, color=config.background)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


class PictureBatches(Dataset):
    """Map-style dataset of Pictures, one for each batch of indices: what the DataLoader workers run."""

    def __init__(self, entries: list[Entry], config: ImagesConfig, batches: Sequence[Sequence[int]]) -> None:
        self.entries, self.config, self.batches = entries, config, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Pictures:
        found = Pictures(torch.empty(0, 3, self.config.resolution, self.config.resolution, dtype=torch.uint8), [], [], [])
        pixels = []
        for entry in (self.entries[place] for place in self.batches[index]):
            try:
                pixels.append(decode(entry.read(), self.config))
            except Exception as reason:  # PIL's decoders raise many kinds (OSError, SyntaxError, struct.error, ...)
                found.unreadable.append({"name": entry.name, "reason": f"{type(reason).__name__}: {reason}"})
            else:
                found.keys.append(entry.key)
                found.labels.append(entry.label)
        if pixels:
            found.pixels = torch.stack(pixels)
        return found


def read_pictures(
    entries: list[Entry], config: ImagesConfig, batches: Sequence[Sequence[int]], num_workers: int = 0
) -> Iterator[Pictures]:
    """The pictures of each batch of indices into ``entries``, in order.

    Raises UserError at the first unreadable picture where ``config.strict``.
    """
    loader = DataLoader(
        PictureBatches(entries, config, batches),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    for pictures in loader:
        if pictures.unreadable and config.strict:
            first = pictures.unreadable[0]
            raise UserError(f"images.strict: expected every picture to be readable, found {first['name']}: {first['reason']}")
        yield pictures


def load_pixels(config: ImagesConfig, num_workers: int = 0) -> tuple[torch.Tensor, list[int | None], list[str]]:
    """All readable pictures of a source at once: uint8 (N, 3, R, R), labels, class names. For sets that fit in memory."""
    entries, classes = list_entries(config)
    batches = [range(start, min(start + 256, len(entries))) for start in range(0, len(entries), 256)]
    parts = list(read_pictures(entries, config, batches, num_workers))
    pixels = torch.cat([part.pixels for part in parts])
    if not len(pixels):
        raise UserError(f"images.source: expected readable pictures, found none of {len(entries)} in {config.source}")
    return pixels, [label for part in parts for label in part.labels], classes
