"""Image and text prompts, and images to start from."""

from __future__ import annotations

from pathlib import Path

import torch

from ..autoencoder import spatial_factor
from ..data.images import decode
from ..errors import UserError
from ..models.clip import ClipEncoder
from ..models.denoiser import sample_sides
from ..pipelines import SMDPipeline


def load_clip(spec: str, pipelines: dict[str, SMDPipeline]) -> ClipEncoder:
    """Load the OpenCLIP network that all models were trained with; ``pipelines`` are by folder.

    Raises UserError if it is not the network of their training embeddings.
    """
    for folder, pipeline in pipelines.items():
        if pipeline.config.embedding is None:
            raise UserError(f"clip: expected null, since {folder} is not conditioned on embeddings, found {spec}")
    clip = ClipEncoder.of(spec, next(iter(pipelines.values())).device, "clip")
    for pipeline in pipelines.values():
        known = pipeline.config.embedding
        if clip.sha256 != known["sha256"]:
            raise UserError(
                f"clip: expected the network used in training, {known['network']} with SHA-256 {known['sha256'][:16]}..., "
                f"found {clip.name} with {clip.sha256[:16]}..."
            )
        wanted, found = (each.get("activation", "GELU") for each in (known, clip.identity()))
        if wanted != found:  # shards of an older version have embeddings of openai without QuickGELU
            raise UserError(
                f"clip: expected the network of training, with the activation {wanted}, found {found}: encode and train again"
            )
    return clip


def prompt_embedding(clip: ClipEncoder, pipeline: SMDPipeline, image_prompt: str | None, prompt: str | None) -> torch.Tensor:
    """Embed the text ``prompt``, or else the image file ``image_prompt``, as (1, D)."""
    if prompt:
        return clip.texts([prompt])
    if image_prompt is None:
        raise ValueError("image_prompt: expected an image file where there is no prompt, found none")
    # Resized to the training resolution first, like the training images.
    return clip.images(read_image("image_prompt", image_prompt, training_side(pipeline))[None])


def read_image(key: str, path: str, side: int) -> torch.Tensor:
    """Read an image as uint8 (3, side, side)."""
    try:
        return decode(Path(path).read_bytes(), side)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: expected an image file, found {path}: {error}") from error


def training_side(pipeline: SMDPipeline) -> int:
    """Return the side of the training images, in pixels; the shorter one if they were not square."""
    sides = [side for side in sample_sides(pipeline.unet) if side]
    if not sides:
        raise UserError("model: expected a denoiser with a sample_size, found none")
    return spatial_factor(pipeline.vae) * min(sides)
