"""The networks that judge a mixture's draws in a distillation: the teacher, and a critic that starts as it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers.models.embeddings import get_timestep_embedding

from ..models.extended import class_of
from ..models.unet import SMDUNet2DModel
from ..schema import check
from .run import Run

TIME_FEATURES = 128
Conditions = dict[str, torch.Tensor | None]


def gaussian(folder: str, run: Run, like: SMDUNet2DModel) -> SMDUNet2DModel:
    """The Gaussian denoiser of a folder, of the same latents and classes as the mixture ``like``, on the device."""
    key = "objective.distillation.teacher"
    found = class_of(folder)
    check(found == "SMDUNet2DModel", key, "the folder of an SMDUNet2DModel (RUN/model/unet)", f"{found or 'none'} in {folder}")
    model = SMDUNet2DModel.from_pretrained(Path(folder), use_safetensors=True)
    check(not model.is_mixture, key, "a Gaussian model", f"a mixture in {folder}")
    for name in ("in_channels", "num_classes"):
        check(model.config[name] == like.config[name], key, f"{name} {like.config[name]}, as the model's", model.config[name])
    return model.to(run.accelerator.device)


def seeing_also(teacher: SMDUNet2DModel, channels: int) -> SMDUNet2DModel:
    """A copy of a Gaussian denoiser that takes ``channels`` more input channels and a second timestep, as ``beside`` gives them.
    Its weights for them are zero, so it starts as the teacher. The second timestep comes in as an image embedding would."""
    dimensions = teacher.config.embedding_dimensions or 0
    more = {"in_channels": teacher.config.in_channels + channels, "embedding_dimensions": dimensions + TIME_FEATURES}
    critic = SMDUNet2DModel.from_config({**teacher.config, **more})
    weights = teacher.state_dict()
    weights["conv_in.weight"] = padded(weights["conv_in.weight"], channels)
    embedding = weights.get("image_embedding.weight", critic.image_embedding.weight[:, :0])
    # Embeddings are scaled by the root of all their dimensions.
    weights["image_embedding.weight"] = padded(embedding * math.sqrt(dimensions / (dimensions + TIME_FEATURES)), TIME_FEATURES)
    critic.load_state_dict(weights)
    return critic.to(teacher.device)


def padded(weight: torch.Tensor, inputs: int) -> torch.Tensor:
    """Zeros for more inputs: (outputs, I, ...) -> (outputs, I + inputs, ...)."""
    return torch.cat((weight, weight.new_zeros(len(weight), inputs, *weight.shape[2:])), dim=1)


def beside(sample: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> tuple[torch.Tensor, Conditions]:
    """Sample and conditions as ``seeing_also`` takes them: x_t (B, C, h, w) as more channels, and t (B,)."""
    features = get_timestep_embedding(t, TIME_FEATURES) / math.sqrt(TIME_FEATURES / 2)  # of length 1
    embeds = conditions.get("image_embeds")
    joined = features if embeds is None else torch.cat((embeds, features), dim=1)
    return torch.cat((sample, x_t), dim=1), {**conditions, "image_embeds": joined}
