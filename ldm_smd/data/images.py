"""The one crop and resize, and batches of decoded images of a source.

DataLoader workers decode, a batch each. An unreadable image does not raise there, so that the caller may count it, list it, or
stop.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .entries import Entry
from .settings import MOST_PIXELS, ImagesConfig
from .sources import list_pictures

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Memory addresses in Pillow's messages, which differ in every run, where manifests are to be the same."""


@dataclass
class Pictures:
    """A batch of images: ``pixels`` uint8 (b, 3, R, R), keys and labels; the name and reason of each that is unreadable; and
    the error, where the source itself could not be read."""

    pixels: torch.Tensor
    keys: list[str]
    labels: list[int | None]
    unreadable: list[dict]
    error: str | None = None

    def pin_memory(self) -> Pictures:
        return replace(self, pixels=self.pixels.pin_memory())


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert any PIL image to 8-bit RGB: first frame, EXIF orientation applied, transparency composited on ``background``,
    16-bit greys scaled (not clipped), CMYK and palettes converted."""
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey; PIL's own conversion to 8 bits clips at 255
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257.0).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, ImageColor.getrgb(background)), rgba)
    return image.convert("RGB")


def decode(
    data: bytes, resolution: int, crop: str = "center", background: str = "white", max_pixels: int = MOST_PIXELS
) -> torch.Tensor:
    """Decode, crop and resize an image to uint8 (3, R, R). Raises whatever PIL raises for a broken one."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ValueError(f"{pixels} pixels, more than images.max_pixels={max_pixels}")
        image.load()
        rgb = to_rgb(image, background)
    # Both scale with PIL's area-aware filter, so a large image does not alias.
    size, how = (resolution, resolution), Image.Resampling.LANCZOS
    square = ImageOps.fit(rgb, size, how) if crop == "center" else ImageOps.pad(rgb, size, how, color=background)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


class PictureBatches(Dataset):
    """Map-style dataset with Pictures for each batch of indices, which the DataLoader workers run."""

    def __init__(self, entries: Sequence[Entry], config: ImagesConfig, batches: Sequence[Sequence[int]]) -> None:
        self.entries, self.config, self.batches = entries, config, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Pictures:
        config, pixels = self.config, []
        found = Pictures(torch.empty(0, 3, config.resolution, config.resolution, dtype=torch.uint8), [], [], [])
        for entry in (self.entries[number] for number in self.batches[index]):
            try:
                pixels.append(decode(entry.read(), config.resolution, config.crop, config.background, config.max_pixels))
            except UserError as error:  # of the source, and not of a picture: a store that is away
                found.error = str(error)
                break
            except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and more
                reason = ADDRESS.sub("", f"{type(error).__name__}: {error}")
                found.unreadable.append({"name": entry.name, "reason": reason})
            else:
                found.keys.append(entry.key)
                found.labels.append(entry.label)
        if pixels:
            found.pixels = torch.stack(pixels)
        return found


def read_pictures(
    entries: Sequence[Entry], config: ImagesConfig, batches: Sequence[Sequence[int]], num_workers: int = 0
) -> Iterator[Pictures]:
    """Read the images of each batch of indices into ``entries``, in order.

    Raises UserError where the source cannot be read, or at the first unreadable image where ``config.strict``.
    """
    dataset = PictureBatches(entries, config, batches)
    for pictures in DataLoader(dataset, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available()):
        if pictures.error:  # raised here: a DataLoader makes several lines of what its workers raise
            raise UserError(pictures.error)
        if pictures.unreadable and config.strict:
            first = pictures.unreadable[0]
            raise UserError(f"images.strict: expected every picture to be readable, found {first['name']}: {first['reason']}")
        yield pictures


def load_pixels(config: ImagesConfig, num_workers: int = 0) -> tuple[torch.Tensor, list[int | None], list[str]]:
    """Read all readable images of a source: uint8 (N, 3, R, R), labels, class names. For sets that fit in memory."""
    entries = list_pictures(config)
    batches = [range(len(entries))[start : start + 256] for start in range(0, len(entries), 256)]
    parts = list(read_pictures(entries, config, batches, num_workers))
    pixels = torch.cat([part.pixels for part in parts])
    if not len(pixels):
        raise UserError(f"images.source: expected readable pictures, found none of {len(entries)} in {config.source}")
    return pixels, [label for part in parts for label in part.labels], entries.classes
