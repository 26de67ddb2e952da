"""Decoding of latents in slices and tiles, to bound the memory, and encoding of images."""

from __future__ import annotations

import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import logging
from PIL import Image

from ..autoencoder import Autoencoder, FrozenAutoencoder
from ..rgb import to_rgb

logger = logging.get_logger(__name__)

TILED_PIXELS = 1024 * 1024
"""Images with more pixels than this are decoded in tiles."""
SLICE_PIXELS = 512 * 512
"""Decode at most this many pixels per call; larger images are decoded one by one. Stable Diffusion's decoder takes 4.9 GB for
1024 x 1024."""


def decode_latents(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalised latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], SLICE_PIXELS at a time.

    Images above TILED_PIXELS are decoded in tiles, whose seams may be visible. The tiling setting of ``vae`` is restored.
    """
    # Made for each call, because the autoencoder may have been moved or replaced.
    autoencoder = FrozenAutoencoder(vae)
    pixels = latents.shape[2] * latents.shape[3] * autoencoder.factor**2
    tiled = pixels > TILED_PIXELS and hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
    if tiled:
        logger.warning("images of more than %d pixels: decoding in tiles", TILED_PIXELS)
        vae.enable_tiling()
    try:
        with autoencoder.working():
            return torch.cat([autoencoder.decode(row) for row in latents.split(max(1, SLICE_PIXELS // pixels))])
    finally:
        if tiled:
            vae.disable_tiling()


def encode_images(vae: Autoencoder, images: PipelineImageInput, shape: tuple[int, ...]) -> torch.Tensor:
    """Encode one image, or one per sample, to normalised latents (B, C, h, w) = ``shape``."""
    autoencoder = FrozenAutoencoder(vae)
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list):
        images = [to_rgb(image) if isinstance(image, Image.Image) else image for image in images]
    pixels = ((VaeImageProcessor(do_resize=False).preprocess(images) + 1.0) * 127.5).round().to(torch.uint8)
    if len(pixels) not in (1, shape[0]):
        raise ValueError(f"image: expected one image, or one for each of {shape[0]} samples, found {len(pixels)}")
    latents = autoencoder.normalise(autoencoder.encode_moments(pixels)[:, 0])
    if latents.shape[1:] != shape[1:]:
        raise ValueError(f"image: expected images with latents of shape {shape[1:]}, found {tuple(latents.shape[1:])}")
    return latents.expand(shape[0], -1, -1, -1)
