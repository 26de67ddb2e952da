"""A weaker denoiser to guide away from (autoguidance, Karras et al., NeurIPS 2024, arXiv 2406.02507)."""

from __future__ import annotations

from pathlib import Path

from diffusers import ModelMixin

from ..schema import check
from .denoiser import embedding_dimensions, num_classes
from .extended import class_of
from .hub import network_folder
from .registry import DENOISERS


def load_guide(source: str | Path, key: str, guided: ModelMixin) -> ModelMixin:
    """Load a denoiser to guide ``guided`` with, on its device.

    Args:
        source: network folder (RUN/model/unet, RUN/checkpoints/images-N/ema) or hub id.
        key: setting that ``source`` comes from.

    Raises UserError unless it is a denoiser with the latents, classes and embeddings of ``guided``.
    """
    folder = network_folder(source, key)
    name = class_of(folder) or "none"
    check(name in DENOISERS, key, "the folder of a denoiser (RUN/checkpoints/images-N/ema)", f"{name} in {source}")
    guide = DENOISERS[name].from_pretrained(folder, use_safetensors=True)
    for what, found, wanted in (
        ("channels", guide.config.in_channels, guided.config.in_channels),
        ("classes", num_classes(guide), num_classes(guided)),
        ("dimensions of embeddings", embedding_dimensions(guide), embedding_dimensions(guided)),
    ):
        check(found == wanted, key, f"{wanted} {what}, like the model", f"{found} in {source}")
    return guide.to(guided.device).requires_grad_(False)
