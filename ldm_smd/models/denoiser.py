"""Functions for any denoiser: of this package or a plain one of diffusers, compiled or not."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

PLAIN = (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel)
"""Supported denoisers of diffusers."""


def is_mixture(unet: ModelMixin) -> bool:
    """Return whether a denoiser is a mixture. Those of diffusers are not."""
    return getattr(unet, "is_mixture", False)


def is_plain(unet: ModelMixin) -> bool:
    """Return whether a denoiser is one of diffusers, possibly wrapped by torch.compile."""
    return isinstance(uncompiled(unet), PLAIN)


def uncompiled(unet: ModelMixin) -> ModelMixin:
    """Return the module inside a torch.compile wrapper, or the module itself."""
    return getattr(unet, "_orig_mod", unet)


def num_classes(unet: ModelMixin) -> int | None:
    """Return the number of classes, without the null class; None for an unconditional model.

    The last class embedding of a plain UNet2DModel is taken as the null class.
    """
    if not is_plain(unet):
        return unet.config.num_classes
    if "num_embeds_ada_norm" in unet.config:  # a DiT, which has one more embedding for the null class
        return unet.config.num_embeds_ada_norm
    embeds = unet.config.get("num_class_embeds")
    return None if embeds is None else embeds - 1


def null_labels(unet: ModelMixin, rows: torch.Tensor) -> torch.Tensor | None:
    """Return the null class for each row of a batch, (B,); None for an unconditional model."""
    classes = num_classes(unet)
    return None if classes is None else torch.full((len(rows),), classes, device=rows.device)


def model_labels(labels: torch.Tensor, num_classes: int | None) -> torch.Tensor | None:
    """Convert labels of latent shards to labels of a model: -1 becomes the null class. None for an unconditional model."""
    return None if num_classes is None else torch.where(labels < 0, num_classes, labels)


def embedding_dimensions(unet: ModelMixin) -> int | None:
    """Return the dimension D of the image embeddings that a denoiser is conditioned on, or None."""
    return getattr(unet.config, "embedding_dimensions", None)


def sample_sides(unet: ModelMixin) -> tuple[int | None, int | None]:
    """Return height and width of the latents that a denoiser was trained on. A plain UNet2DModel may have none."""
    size = unet.config.sample_size
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def predict(
    unet: ModelMixin,
    sample: torch.Tensor,
    timestep: torch.Tensor | float | int,
    class_labels: torch.Tensor | None = None,
    eta: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the prediction of any denoiser, with the arguments of SMDUNet2DModel.forward. Denoisers of diffusers ignore eta.
    The learned variance of a DiT is dropped."""
    return predict_all(unet, sample, timestep, class_labels, eta, image_embeds)[:, : sample.shape[1]]


def predict_all(
    unet: ModelMixin,
    sample: torch.Tensor,
    timestep: torch.Tensor | float | int,
    class_labels: torch.Tensor | None = None,
    eta: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    forward: nn.Module | None = None,
) -> torch.Tensor:
    """Return all output channels of any denoiser. ``forward`` is its wrapper by DDP, FSDP or torch.compile, if any."""
    if image_embeds is not None and embedding_dimensions(unet) is None:
        raise ValueError("image_embeds: expected None, this model is not conditioned on embeddings")
    forward = unet if forward is None else forward
    if not is_plain(unet):
        embeds = {} if image_embeds is None else {"image_embeds": image_embeds}
        return forward(sample, timestep, class_labels, eta, return_dict=False, **embeds)[0]
    timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
    plain = uncompiled(unet)
    given: dict[str, torch.Tensor | None] = {"timestep": timestep}
    if isinstance(plain, UNet2DConditionModel):  # attends to zeros, like SD3
        given["encoder_hidden_states"] = sample.new_zeros(len(sample), 1, unet.config.cross_attention_dim)
    elif isinstance(plain, SD3Transformer2DModel):
        given["encoder_hidden_states"] = sample.new_zeros(len(sample), 1, unet.config.joint_attention_dim)
        given["pooled_projections"] = sample.new_zeros(len(sample), unet.config.pooled_projection_dim)
    else:
        given["class_labels"] = null_labels(unet, sample) if class_labels is None else class_labels
    return forward(sample, return_dict=False, **given)[0]
