"""Latents to images, in slices and tiles that bound the memory, and images to latents."""

from __future__ import annotations

import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import logging

from ..autoencoder import Autoencoder, FrozenAutoencoder

logger = logging.get_logger(__name__)

TILED_PIXELS = 1024 * 1024
"""Decode images of more pixels than this in tiles."""
SLICE_PIXELS = 512 * 512
"""Decode at most this many pixels per call; larger images are decoded one by one. Stable Diffusion's decoder takes 4.9 GB for
1024 x 1024."""


def decode_latents(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalised latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], SLICE_PIXELS at a time.

    Above TILED_PIXELS an image is decoded in tiles, whose seams may show; tiling is as it was afterwards.
    """
    # Made for each call: a kept one would miss that the autoencoder was moved or replaced.
    autoencoder = FrozenAutoencoder(vae)
    pixels = latents.shape[2] * latents.shape[3] * autoencoder.factor**2
    tiled = pixels > TILED_PIXELS and hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
    if tiled:
        logger.warning("pictures of more than %d pixels: decoding in tiles", TILED_PIXELS)
        vae.enable_tiling()
    try:
        with autoencoder.working():
            return torch.cat([autoencoder.decode(row) for row in latents.split(max(1, SLICE_PIXELS // pixels))])
    finally:
        if tiled:
            vae.disable_tiling()


def encode_images(vae: Autoencoder, images: PipelineImageInput, shape: tuple[int, ...]) -> torch.Tensor:
    """Encode one image, or one for each sample, to normalised latents (B, C, h, w) = ``shape``."""
    autoencoder = FrozenAutoencoder(vae)
    pixels = ((VaeImageProcessor(do_resize=False).preprocess(images) + 1.0) * 127.5).round().to(torch.uint8)
    if len(pixels) not in (1, shape[0]):
        raise ValueError(f"image: expected one picture, or one for each of {shape[0]} samples, found {len(pixels)}")
    latents = autoencoder.normalise(autoencoder.encode_moments(pixels)[:, 0])
    if latents.shape[1:] != shape[1:]:
        raise ValueError(f"image: expected pictures with latents {shape[1:]}, found {tuple(latents.shape[1:])}")
    return latents.expand(shape[0], -1, -1, -1)
