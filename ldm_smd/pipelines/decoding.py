"""Decoding of latents and encoding of images, in slices and tiles to bound the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import logging
from PIL import Image

from ..autoencoder import Autoencoder, FrozenAutoencoder
from ..rgb import to_rgb

logger = logging.get_logger(__name__)

TILED_PIXELS = 1024 * 1024
"""Images with more pixels than this are decoded and encoded in tiles."""
SLICE_PIXELS = 512 * 512
"""Decode or encode at most this many pixels per call; larger images go one by one. Stable Diffusion's decoder takes 4.9 GB for
1024 x 1024."""


def decode_latents(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalised latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], SLICE_PIXELS at a time.

    Images above TILED_PIXELS are decoded in tiles, whose seams may be visible. The tiling setting of ``vae`` is restored.
    """
    # Made for each call, because the autoencoder may have been moved or replaced.
    autoencoder = FrozenAutoencoder(vae)
    pixels = latents.shape[2] * latents.shape[3] * autoencoder.factor**2
    with autoencoder.working(), tiled(vae, pixels):
        return torch.cat([autoencoder.decode(rows) for rows in latents.split(slice_rows(pixels))])


def encode_images(vae: Autoencoder, images: PipelineImageInput, shape: tuple[int, ...], repeats: int = 1) -> torch.Tensor:
    """Encode images to normalised latents (B, C, h, w) = ``shape``, in slices and tiles as ``decode_latents``. There may be one
    image for all samples, one for each, or one for each ``repeats`` of them."""
    autoencoder = FrozenAutoencoder(vae)
    if isinstance(images, Image.Image):
        images = [images]
    images = [readable(image) for image in images] if isinstance(images, list) else readable(images)
    scaled = (VaeImageProcessor(do_resize=False).preprocess(images) + 1.0) * 127.5
    pixels = scaled.round().clamp(0, 255).to(torch.uint8)
    if len(pixels) not in (1, shape[0]) and len(pixels) * repeats != shape[0]:
        raise ValueError(f"image: expected one image, or one for each of {shape[0]} samples, found {len(pixels)}")
    size = pixels.shape[2] * pixels.shape[3]
    with autoencoder.working(), tiled(vae, size):
        means = torch.cat([autoencoder.encode_moments(rows)[:, 0] for rows in pixels.split(slice_rows(size))])
    latents = autoencoder.normalise(means)
    if latents.shape[1:] != shape[1:]:
        raise ValueError(f"image: expected images with latents of shape {shape[1:]}, found {tuple(latents.shape[1:])}")
    return latents.repeat_interleave(shape[0] // len(latents), dim=0)


def readable(image: Any) -> Any:
    """Return an image as diffusers' image processor reads it: PIL images in RGB, 8-bit arrays and tensors as floats."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return image.astype(np.float32) / 255.0
    return image / 255.0 if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 else image


def slice_rows(pixels: int) -> int:
    return max(1, SLICE_PIXELS // pixels)


@contextmanager
def tiled(vae: Autoencoder, pixels: int) -> Iterator[None]:
    """Within the context, let the autoencoder work in tiles if an image has more than TILED_PIXELS."""
    tiles = pixels > TILED_PIXELS and hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
    if tiles:
        logger.warning("images of more than %d pixels: the autoencoder works in tiles", TILED_PIXELS)
        vae.enable_tiling()
    try:
        yield
    finally:
        if tiles:
            vae.disable_tiling()
