"""Decoding, cropping and resizing of images, and batches of them from a source.

Each DataLoader worker decodes whole batches. An unreadable image raises no error there, so that the caller can count it, list
it, or stop.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..rgb import to_rgb
from .entries import Entry
from .settings import MAX_PIXELS, ImagesConfig
from .sources import list_images

logger = logging.getLogger(__name__)
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Memory addresses in Pillow's messages. They are removed, so that two runs write the same manifest."""
DRAFT_FACTOR = 2
"""A JPEG is decoded at a fraction of its size, but at no less than this times the resolution."""


@dataclass
class ImageBatch:
    """Decoded images of a batch.

    Attributes:
        pixels: uint8, (b, 3, R, R).
        keys, labels: one for each image; None for no label.
        unreadable: name and reason of each image that could not be read.
        error: message, if the source itself could not be read.
    """

    pixels: torch.Tensor
    keys: list[str]
    labels: list[int | None]
    unreadable: list[dict]
    error: str | None = None

    def pin_memory(self) -> ImageBatch:
        return replace(self, pixels=self.pixels.pin_memory())


def decode(
    data: bytes, resolution: int, crop: str = "center", background: str = "white", max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """Decode, crop and resize an image to uint8, (3, R, R). Raises any error of PIL, or ValueError for too many pixels."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ValueError(f"{pixels} pixels, more than images.max_pixels={max_pixels}")
        # At 1/2, 1/4 or 1/8 of its size, a JPEG is decoded several times as fast.
        image.draft(None, (DRAFT_FACTOR * resolution, DRAFT_FACTOR * resolution))
        image.load()
        rgb = to_rgb(image, background)
    # PIL widens its filters when it scales down, so large images do not alias.
    size, filter_ = (resolution, resolution), Image.Resampling.LANCZOS
    square = ImageOps.fit(rgb, size, filter_) if crop == "center" else ImageOps.pad(rgb, size, filter_, color=background)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


class ImageBatchDataset(Dataset):
    """Map-style dataset of ImageBatch, one for each batch of indices. Runs in the DataLoader workers."""

    def __init__(self, entries: Sequence[Entry], config: ImagesConfig, batches: Sequence[Sequence[int]]) -> None:
        self.entries, self.config, self.batches = entries, config, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> ImageBatch:
        config, pixels = self.config, []
        batch = ImageBatch(torch.empty(0, 3, config.resolution, config.resolution, dtype=torch.uint8), [], [], [])
        for entry in (self.entries[number] for number in self.batches[index]):
            try:
                pixels.append(decode(entry.read(), config.resolution, config.crop, config.background, config.max_pixels))
            except UserError as error:  # of the source, not of an image: for example, a store is unreachable
                batch.error = str(error)
                break
            except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and others
                reason = ADDRESS.sub("", f"{type(error).__name__}: {error}")
                batch.unreadable.append({"name": entry.name, "reason": reason})
            else:
                batch.keys.append(entry.key)
                batch.labels.append(entry.label)
        if pixels:
            batch.pixels = torch.stack(pixels)
        return batch


def read_images(
    entries: Sequence[Entry], config: ImagesConfig, batches: Sequence[Sequence[int]], num_workers: int = 0
) -> Iterator[ImageBatch]:
    """Read the images of each batch of indices into ``entries``, in order.

    Raises UserError if the source cannot be read, and at the first unreadable image if ``config.strict``.
    """
    dataset = ImageBatchDataset(entries, config, batches)
    for batch in DataLoader(dataset, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available()):
        if batch.error:  # raised here, because an error raised in a DataLoader worker comes with its traceback
            raise UserError(batch.error)
        if batch.unreadable and config.strict:
            first = batch.unreadable[0]
            raise UserError(f"images.strict: expected every image to be readable, found {first['name']}: {first['reason']}")
        yield batch


def warn_unreadable(config: ImagesConfig, unreadable: list[dict]) -> None:
    """Log how many images of a source were skipped, and the first of them."""
    if unreadable:
        first = unreadable[0]
        logger.warning(
            "%s: skipped %d unreadable images, first %s: %s", config.source, len(unreadable), first["name"], first["reason"]
        )


def load_pixels(config: ImagesConfig, num_workers: int = 0) -> tuple[torch.Tensor, list[int | None], list[str]]:
    """Read all images of a source into memory. Return pixels, uint8 (N, 3, R, R), labels and class names."""
    entries = list_images(config)
    batches = [range(len(entries))[start : start + 256] for start in range(0, len(entries), 256)]
    parts = list(read_images(entries, config, batches, num_workers))
    pixels = torch.cat([part.pixels for part in parts])
    warn_unreadable(config, [item for part in parts for item in part.unreadable])
    if not len(pixels):
        raise UserError(f"images.source: expected readable images, found none of {len(entries)} in {config.source}")
    return pixels, [label for part in parts for label in part.labels], entries.classes
