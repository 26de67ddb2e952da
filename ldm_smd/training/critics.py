"""The critic of a distillation: a copy of the teacher with more inputs and outputs."""

from __future__ import annotations

import math

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import get_timestep_embedding

from ..diffusion.settings import DistillationConfig
from ..models.extended_dit import without_label_dropout
from ..models.unet import SMDUNet2DModel
from ..models.widened import padded, widened

TIME_FEATURES = 128
"""Features of the first view's t that are appended to the image embeddings."""
TIME_CHANNELS = 8
"""Features of it that are appended as channels."""
Conditions = dict[str, torch.Tensor | None]


def make_critic(teacher: ModelMixin, settings: DistillationConfig) -> ModelMixin:
    """Copy the teacher with the inputs and outputs that ``DistillationLosses`` needs. New weights start at zero."""
    sees_x_t, has_logit = settings.views == "conditional", settings.adversarial_weight > 0
    channels = teacher.config.in_channels if sees_x_t else 0
    if isinstance(teacher, SMDUNet2DModel):
        critic: ModelMixin = extended_copy(teacher, channels, TIME_FEATURES if sees_x_t else 0, int(has_logit))
    else:
        critic = without_label_dropout(widened(teacher, channels + TIME_CHANNELS if sees_x_t else 0, int(has_logit)))
    return critic.requires_grad_(True)


def extended_copy(teacher: SMDUNet2DModel, inputs: int, features: int, outputs: int) -> SMDUNet2DModel:
    """Copy a Gaussian denoiser with additional input channels, embedding dimensions (``features``) and output channels. Their
    weights are zero."""
    before = teacher.config.embedding_dimensions or 0
    dimensions = before + features
    channels = {name: teacher.config[name] + more for name, more in (("in_channels", inputs), ("out_channels", outputs))}
    copied = SMDUNet2DModel.from_config(teacher.config, **channels, embedding_dimensions=dimensions or None)
    weights = teacher.state_dict()
    weights["conv_in.weight"] = padded(weights["conv_in.weight"], inputs, dim=1)
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = padded(weights[name], outputs, dim=0)
    if copied.image_embedding is not None:
        embedding = weights.get("image_embedding.weight", copied.image_embedding.weight[:, :0])
        # The UNet scales embeddings by the square root of their total dimension.
        weights["image_embedding.weight"] = padded(embedding * math.sqrt(before / dimensions), features, dim=1)
    copied.load_state_dict(weights)
    return copied.to(teacher.device)


def with_first_view(
    critic: ModelMixin, sample: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions
) -> tuple[torch.Tensor, Conditions]:
    """Append x_t (B, C, h, w) to a sample as channels, and features of t (B,) to the image embeddings, or as channels for a
    critic without image embeddings."""
    if not isinstance(critic, SMDUNet2DModel):
        features = get_timestep_embedding(t, TIME_CHANNELS)[..., None, None]
        return torch.cat((sample, x_t, features.expand(-1, -1, *sample.shape[2:])), dim=1), conditions
    features = get_timestep_embedding(t, TIME_FEATURES) / math.sqrt(TIME_FEATURES / 2)  # of length 1
    embeds = conditions.get("image_embeds")
    joined = features if embeds is None else torch.cat((embeds, features), dim=1)
    return torch.cat((sample, x_t), dim=1), {**conditions, "image_embeds": joined}
