"""The critic of a distillation: a copy of the teacher that sees and says more, and how it is asked."""

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
"""Of the first view's t, where they go beside the image embeddings."""
TIME_CHANNELS = 8
"""Of it, where they are channels."""
Conditions = dict[str, torch.Tensor | None]


def critic_of(teacher: ModelMixin, settings: DistillationConfig) -> ModelMixin:
    """Copy the teacher, to see and say what ``Judges`` asks for; what is new starts at zero."""
    sees_x_t, tells = settings.views == "conditional", settings.adversarial_weight > 0
    channels = teacher.config.in_channels if sees_x_t else 0
    if isinstance(teacher, SMDUNet2DModel):
        critic: ModelMixin = extended(teacher, channels, TIME_FEATURES if sees_x_t else 0, int(tells))
    else:
        critic = without_label_dropout(widened(teacher, channels + TIME_CHANNELS if sees_x_t else 0, int(tells)))
    return critic.requires_grad_(True)


def extended(teacher: SMDUNet2DModel, inputs: int, features: int, outputs: int) -> SMDUNet2DModel:
    """A copy of a Gaussian denoiser with so many more input channels, dimensions of its embedding, and output channels; all
    their weights are zero."""
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
        # Embeddings are scaled by the root of all their dimensions.
        weights["image_embedding.weight"] = padded(embedding * math.sqrt(before / dimensions), features, dim=1)
    copied.load_state_dict(weights)
    return copied.to(teacher.device)


def beside(
    critic: ModelMixin, sample: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions
) -> tuple[torch.Tensor, Conditions]:
    """Put x_t (B, C, h, w) beside a sample as more channels, and t (B,) beside the image embeddings, or where the critic of
    ``critic_of`` has none, as channels too."""
    if not isinstance(critic, SMDUNet2DModel):
        features = get_timestep_embedding(t, TIME_CHANNELS)[..., None, None]
        return torch.cat((sample, x_t, features.expand(-1, -1, *sample.shape[2:])), dim=1), conditions
    features = get_timestep_embedding(t, TIME_FEATURES) / math.sqrt(TIME_FEATURES / 2)  # of length 1
    embeds = conditions.get("image_embeds")
    joined = features if embeds is None else torch.cat((embeds, features), dim=1)
    return torch.cat((sample, x_t), dim=1), {**conditions, "image_embeds": joined}
