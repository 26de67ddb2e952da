"""ExtendedSD3Transformer2DModel: extends a pretrained Gaussian SD3Transformer2DModel of diffusers to a mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from .backbone import Backbone, Trunk
from .blocks import zero_init
from .denoiser import null_labels
from .extended import plain_config
from .extended_transformer import as_map, as_tokens, check_sides, cut_before_blocks, run_block, unpatched
from .mixture import Draws, Mixture


class ExtendedSD3Transformer2DModel(Backbone):
    """A ``diffusers.SD3Transformer2DModel`` (arXiv 2403.03206), a flow matching network, with the mixture of SMDUNet2DModel.

    A draw enters before each of the last ``tail_blocks`` blocks; the blocks before run once per image. In place of text it has
    learned pooled vectors for the class and an OpenCLIP image embedding, and attends to ``empty_states``. They start at zero,
    so that the model starts as the network with zeros for its text. ``self.transformer`` remains a plain SD3Transformer2DModel
    that can be saved by itself.

    Args:
        transformer_config: config of the SD3Transformer2DModel.
        sample_size, in_channels: those of the transformer.
        num_classes, embedding_dimensions, empty_tokens: as in ExtendedUNet2DConditionModel.
        tail_blocks: number of last blocks that run once per draw.
        z_channels, identifier_channels, hypernetwork_width, noise_rank, noise_modes, noise_timesteps: as in SMDUNet2DModel.
    """

    _supports_gradient_checkpointing = True  # in the blocks of its transformer
    _no_split_modules = SD3Transformer2DModel._no_split_modules
    mixture: Mixture

    @register_to_config
    def __init__(
        self,
        transformer_config: dict,
        sample_size: int,
        in_channels: int,
        num_classes: int | None = None,
        embedding_dimensions: int | None = None,
        empty_tokens: int = 1,
        tail_blocks: int = 4,
        z_channels: int = 32,
        identifier_channels: int = 32,
        hypernetwork_width: int = 64,
        noise_rank: int = 128,
        noise_modes: int = 256,
        noise_timesteps: int = 1001,
    ) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel.from_config(transformer_config)
        config, width = self.transformer.config, self.transformer.inner_dim
        self.empty_states = nn.Parameter(torch.zeros(empty_tokens, config.joint_attention_dim))
        pooled = config.pooled_projection_dim
        self.class_pooled = None if num_classes is None else zero_init(nn.Embedding(num_classes + 1, pooled))
        self.image_pooled = None
        if embedding_dimensions is not None:
            self.image_pooled = zero_init(nn.Linear(embedding_dimensions, pooled, bias=False))
        self.first_of_tail = len(self.transformer.transformer_blocks) - tail_blocks
        self.mixture = Mixture(cut_before_blocks(self.transformer, tail_blocks, in_channels, width), self.config)

    @classmethod
    def from_transformer(
        cls, folder: str | Path, num_classes: int | None = None, embedding_dimensions: int | None = None, **mixture: int
    ) -> ExtendedSD3Transformer2DModel:
        """Load the SD3Transformer2DModel in ``folder``; add the conditions and a new mixture."""
        plain = SD3Transformer2DModel.from_pretrained(folder, use_safetensors=True)
        sizes = {"sample_size": plain.config.sample_size, "in_channels": plain.config.in_channels}
        conditions = {"num_classes": num_classes, "embedding_dimensions": embedding_dimensions}
        model = cls(transformer_config=plain_config(plain), **sizes, **conditions, **mixture)
        model.transformer.load_state_dict(plain.state_dict())
        return model

    def pooled(
        self, sample: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the sum of the vectors of all conditions, (B, pooled_projection_dim)."""
        pooled = sample.new_zeros(len(sample), self.transformer.config.pooled_projection_dim)
        if class_labels is not None and self.class_pooled is None:
            raise ValueError("class_labels: expected None, this model has num_classes=None")
        if self.class_pooled is not None:
            pooled = pooled + self.class_pooled(null_labels(self, sample) if class_labels is None else class_labels)
        if image_embeds is not None:
            if self.image_pooled is None:
                raise ValueError("image_embeds: expected None, this model has embedding_dimensions=None")
            scale = math.sqrt(image_embeds.shape[1])  # of unit variance
            pooled = pooled + self.image_pooled(scale * image_embeds.to(sample.dtype))
        return pooled

    def trunk(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> Trunk:
        network = self.transformer
        check_sides(sample, network.config.patch_size)
        embedding = network.time_text_embed(timestep.expand(len(sample)), self.pooled(sample, class_labels, image_embeds))
        states = network.context_embedder(self.empty_states.to(sample.dtype).expand(len(sample), -1, -1))
        tokens = network.pos_embed(sample).contiguous()
        for index in range(self.first_of_tail):
            states, tokens = run_block(network, index, tokens, states, embedding)
        rows = sample.shape[2] // network.config.patch_size
        return Trunk(as_map(tokens, rows), F.silu(embedding), (embedding, states))

    def tail(self, trunk: Trunk, draws: Draws) -> torch.Tensor:
        network, h, rows = self.transformer, trunk.features, trunk.features.shape[2]
        embedding, states = cast(tuple[torch.Tensor, torch.Tensor], trunk.kept)
        embedding, states = draws.modulated(embedding), draws.repeat(states)
        last = len(network.transformer_blocks) - 1
        for index in range(self.first_of_tail, last + 1):
            h = draws.at(f"block{index}", h)
            if index == last:
                h = draws.with_noise(h)
            states, tokens = run_block(network, index, as_tokens(h), states, embedding)
            h = as_map(tokens, rows)
        return unpatched(network.proj_out(network.norm_out(tokens, embedding)), rows, network.config.patch_size)
