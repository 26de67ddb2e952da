"""The one crop and resize, and batches of decoded pictures of a source.

Decoding happens in DataLoader workers, a batch each. A picture that cannot be read does not raise there, so that the caller
counts it, lists it, or stops.
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
from .settings import MOST_PIXELS, ImagesConfig
from .sources import Entry, list_entries

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""In memory, as Pillow has it in its messages: another in every run, where manifests are to be the same."""


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


def decode(
    data: bytes, resolution: int, crop: str = "center", background: str = "white", max_pixels: int = MOST_PIXELS
) -> torch.Tensor:
    """An encoded picture as uint8 (3, R, R), cropped and resized. Raises whatever PIL raises for a broken one."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ValueError(f"{pixels} pixels, more than images.max_pixels={max_pixels}")
        image.load()
        rgb = to_rgb(image, background)
    size = (resolution, resolution)
    # Both scale with PIL's area-aware filter, so a large picture does not alias.
    if crop == "center":
        square = ImageOps.fit(rgb, size, Image.Resampling.LANCZOS)
    else:
        square = ImageOps.pad(rgb, size, Image.Resampling.LANCZOS, color=background)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


class PictureBatches(Dataset):
    """Map-style dataset of Pictures, one for each batch of indices: what the DataLoader workers run."""

    def __init__(self, entries: list[Entry], config: ImagesConfig, batches: Sequence[Sequence[int]]) -> None:
        self.entries, self.config, self.batches = entries, config, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Pictures:
        config, pixels = self.config, []
        found = Pictures(torch.empty(0, 3, config.resolution, config.resolution, dtype=torch.uint8), [], [], [])
        for entry in (self.entries[place] for place in self.batches[index]):
            try:
                pixels.append(decode(entry.read(), config.resolution, config.crop, config.background, config.max_pixels))
            except Exception as reason:  # PIL's decoders raise many kinds (OSError, SyntaxError, struct.error, ...)
                said = ADDRESS.sub("", f"{type(reason).__name__}: {reason}")
                found.unreadable.append({"name": entry.name, "reason": said})
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
