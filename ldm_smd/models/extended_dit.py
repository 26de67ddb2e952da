"""ExtendedDiTTransformer2DModel: extends a pretrained Gaussian DiTTransformer2DModel of diffusers to a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import LabelEmbedding

from .backbone import Backbone, Trunk
from .denoiser import null_labels, num_classes
from .extended import plain_config
from .extended_transformer import as_map, as_tokens, check_sides, cut_before_blocks, run_block, unpatched
from .mixture import Draws, Mixture
from .widened import widened


class ExtendedDiTTransformer2DModel(Backbone):
    """A ``diffusers.DiTTransformer2DModel`` (arXiv 2212.09748) with the mixture of SMDUNet2DModel. A draw enters before each of
    the last ``tail_blocks`` transformer blocks; the blocks before run once per image. ``self.transformer`` remains a plain
    DiTTransformer2DModel that can be saved by itself.

    Args:
        transformer_config: config of the DiTTransformer2DModel, with as many output as input channels.
        sample_size, in_channels: those of the DiT.
        num_classes: number of classes, ``num_embeds_ada_norm`` of the DiT. A label equal to it is the null class.
        tail_blocks: number of last blocks that run once per draw.
        z_channels, identifier_channels, hypernetwork_width, noise_rank, noise_modes, noise_timesteps: as in SMDUNet2DModel.
    """

    _supports_gradient_checkpointing = True  # in the blocks of its DiT
    mixture: Mixture

    @register_to_config
    def __init__(
        self,
        transformer_config: dict,
        sample_size: int,
        in_channels: int,
        num_classes: int,
        tail_blocks: int = 4,
        z_channels: int = 32,
        identifier_channels: int = 32,
        hypernetwork_width: int = 64,
        noise_rank: int = 128,
        noise_modes: int = 256,
        noise_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.transformer = DiTTransformer2DModel.from_config(transformer_config)
        without_label_dropout(self)
        self.first_of_tail = len(self.transformer.transformer_blocks) - tail_blocks
        self.mixture = Mixture(cut_before_blocks(self.transformer, tail_blocks, in_channels, 0), self.config)

    @classmethod
    def from_transformer(cls, folder: str | Path, **mixture: int) -> ExtendedDiTTransformer2DModel:
        """Load the DiTTransformer2DModel in ``folder`` and add a new mixture.

        Extra output channels, in which the ImageNet DiTs predict a variance, are dropped.
        """
        dit = widened(DiTTransformer2DModel.from_pretrained(folder, use_safetensors=True))
        sizes = {"sample_size": dit.config.sample_size, "in_channels": dit.config.in_channels}
        model = cls(transformer_config=plain_config(dit), num_classes=num_classes(dit), **sizes, **mixture)
        model.transformer.load_state_dict(dit.state_dict())
        return model

    def trunk(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> Trunk:
        dit = self.transformer
        if image_embeds is not None:
            raise ValueError("image_embeds: expected None, this model is not conditioned on embeddings")
        check_sides(sample, dit.patch_size)
        labels = cast(torch.Tensor, null_labels(self, sample) if class_labels is None else class_labels)
        timestep = timestep.expand(len(sample))
        tokens = dit.pos_embed(sample)
        for index in range(self.first_of_tail):
            tokens = self._run(index, tokens, timestep, labels)
        embedding = F.silu(dit.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=tokens.dtype))
        return Trunk(as_map(tokens, sample.shape[2] // dit.patch_size), embedding, (timestep, labels))

    def tail(self, trunk: Trunk, draws: Draws) -> torch.Tensor:
        dit, h = self.transformer, trunk.features
        timestep, labels = (draws.repeat(each) for each in cast(tuple[torch.Tensor, torch.Tensor], trunk.kept))
        rows = h.shape[2]
        for index in range(self.first_of_tail, len(dit.transformer_blocks)):
            h = draws.at(f"block{index}", h)
            if index == len(dit.transformer_blocks) - 1:
                h = draws.with_noise(h)
            tokens = self._run(index, as_tokens(h), timestep, labels)
            h = as_map(tokens, rows)
        shift, scale = dit.proj_out_1(draws.repeat(trunk.embedding)).chunk(2, dim=1)
        tokens = dit.proj_out_2(torch.addcmul(shift[:, None], dit.norm_out(tokens), 1 + scale[:, None]))
        return unpatched(tokens, rows, dit.patch_size)

    def _run(self, index: int, tokens: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # (attention mask, states and mask to attend to, timestep, attention options, labels)
        return run_block(self.transformer, index, tokens, None, None, None, timestep, None, labels)


def without_label_dropout(model: ModelMixin) -> ModelMixin:
    """Disable the label dropout inside DiTs in ``model``. The training loop drops labels itself, reproducibly."""
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model
