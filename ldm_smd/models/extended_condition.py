"""ExtendedUNet2DConditionModel: extends a pretrained Gaussian UNet2DConditionModel of diffusers to a mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from .backbone import Backbone, Trunk
from .blocks import zero_init
from .denoiser import null_labels
from .extended import cut_before_up_block, decoder_path, encoder_path, first_up_block, plain_config
from .mixture import Draws, Mixture
from .widened import without_variance

ABSENT = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Settings of a UNet2DConditionModel that must be None: conditions other than cross-attention."""


class ExtendedUNet2DConditionModel(Backbone):
    """A ``diffusers.UNet2DConditionModel``, such as Stable Diffusion's, with the mixture of SMDUNet2DModel, placement "up".

    In place of text it attends to learned tokens: ``empty_states``, one token for the class, and one for an OpenCLIP image
    embedding. They start at zero, so that the model starts as the UNet with zeros for its text. ``self.unet`` remains a plain
    UNet2DConditionModel that can be saved by itself.

    Args:
        unet_config: config of the UNet2DConditionModel, with cross-attention as its only condition.
        sample_size, in_channels: those of the UNet.
        num_classes: number of classes, or None. A label equal to it is the null class.
        embedding_dimensions: D of the image embeddings to condition on, or None.
        empty_tokens: number of ``empty_states``; set it to the length of the text encoder's output to start from an empty text.
        tail_blocks: number of last up blocks that run once per draw; None for all.
        z_channels, identifier_channels, hypernetwork_width, noise_rank, noise_modes, noise_timesteps: as in SMDUNet2DModel.
    """

    _supports_gradient_checkpointing = True  # in the blocks of its UNet
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]
    mixture: Mixture

    @register_to_config
    def __init__(
        self,
        unet_config: dict,
        sample_size: int,
        in_channels: int,
        num_classes: int | None = None,
        embedding_dimensions: int | None = None,
        empty_tokens: int = 1,
        tail_blocks: int | None = None,
        z_channels: int = 32,
        identifier_channels: int = 32,
        hypernetwork_width: int = 64,
        noise_rank: int = 128,
        noise_modes: int = 256,
        noise_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(unet_config)
        check_conditions(self.unet)
        width = self.unet.config.cross_attention_dim
        self.empty_states = nn.Parameter(torch.zeros(empty_tokens, width))
        self.class_states = None if num_classes is None else zero_init(nn.Embedding(num_classes + 1, width))
        self.image_states = None
        if embedding_dimensions is not None:
            self.image_states = zero_init(nn.Linear(embedding_dimensions, width, bias=False))
        self.first_of_tail = first_up_block(self.unet, tail_blocks)
        self.mixture = Mixture(cut_before_up_block(self.unet, self.first_of_tail), self.config)
        present = {type(module).__name__ for module in self.modules()}  # FSDP refuses others; not all attention is of this kind
        self._no_split_modules = [name for name in self._no_split_modules if name in present]

    @classmethod
    def from_unet(
        cls, folder: str | Path, num_classes: int | None = None, embedding_dimensions: int | None = None, **mixture: int
    ) -> ExtendedUNet2DConditionModel:
        """Load the UNet2DConditionModel in ``folder``; add tokens for the conditions and a new mixture."""
        unet = without_variance(UNet2DConditionModel.from_pretrained(folder, use_safetensors=True))
        sizes = {"sample_size": unet.config.sample_size, "in_channels": unet.config.in_channels}
        conditions = {"num_classes": num_classes, "embedding_dimensions": embedding_dimensions}
        model = cls(unet_config=plain_config(unet), **sizes, **conditions, **mixture)
        model.unet.load_state_dict(unet.state_dict())
        return model

    def states(
        self, sample: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the tokens to attend to, (B, tokens, cross_attention_dim): empty states and a token per condition."""
        tokens = [self.empty_states.to(sample.dtype).expand(len(sample), -1, -1)]
        if class_labels is not None and self.class_states is None:
            raise ValueError("class_labels: expected None, this model has num_classes=None")
        if self.class_states is not None:
            tokens.append(self.class_states(null_labels(self, sample) if class_labels is None else class_labels)[:, None])
        if self.image_states is not None:
            dimensions = self.config.embedding_dimensions
            embeds = sample.new_zeros(len(sample), dimensions) if image_embeds is None else image_embeds.to(sample.dtype)
            tokens.append(self.image_states(embeds * math.sqrt(dimensions))[:, None])  # of unit variance
        elif image_embeds is not None:
            raise ValueError("image_embeds: expected None, this model has embedding_dimensions=None")
        return torch.cat(tokens, dim=1)

    def trunk(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> Trunk:
        unet, states = self.unet, self.states(sample, class_labels, image_embeds)
        embedding = unet.time_embedding(unet.time_proj(timestep.expand(len(sample))).to(sample.dtype))
        embedding = embedding if unet.time_embed_act is None else unet.time_embed_act(embedding)
        h, skips = encoder_path(unet, sample, embedding, self.first_of_tail, states)
        return Trunk(h, F.silu(embedding), (embedding, skips, states))

    def tail(self, trunk: Trunk, draws: Draws) -> torch.Tensor:
        embedding, skips, states = cast(tuple[torch.Tensor, list[torch.Tensor], torch.Tensor], trunk.kept)
        return decoder_path(self.unet, trunk.features, embedding, skips, draws, self.first_of_tail, states)


def check_conditions(unet: UNet2DConditionModel) -> None:
    """Raise ValueError if a UNet has other conditions than cross-attention of a single width, like that of SDXL."""
    config = unet.config
    found = [f"{name} {config[name]!r}" for name in ABSENT if config[name] is not None]
    if found or not isinstance(config.cross_attention_dim, int):
        wanted = "expected a UNet with cross-attention as its only condition, of a single width"
        raise ValueError(f"unet: {wanted}, found {', '.join(found) or config.cross_attention_dim}")
