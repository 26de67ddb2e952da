"""ExtendedDiTTransformer2DModel: a Gaussian diffusers.DiTTransformer2DModel, trained elsewhere, extended to a mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import LabelEmbedding
from einops import rearrange

from .backbone import Backbone, Trunk
from .denoiser import null_labels
from .extended import plain_config
from .mixture import Cut, Draws, Mixture

MOST_GROUPS = 32


class ExtendedDiTTransformer2DModel(Backbone):
    """A ``diffusers.DiTTransformer2DModel`` (arXiv 2212.09748) with the mixture of SMDUNet2DModel: a draw enters before each of
    the last ``tail_blocks`` transformer blocks, all before run once an image. ``self.transformer`` stays a plain
    DiTTransformer2DModel, which can be saved by itself.

    Args:
        transformer_config: of the DiTTransformer2DModel, with as many output as input channels.
        sample_size, in_channels: of the DiT.
        num_classes: number of classes, ``num_embeds_ada_norm`` of the DiT; a label equal to it is "no label".
        tail_blocks: blocks that every draw runs through.
        z_channels, identifier_channels, hypernetwork_width, noise_rank, noise_modes, noise_timesteps: as in SMDUNet2DModel.
    """

    _supports_gradient_checkpointing = True  # of its DiT's blocks
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
        blocks, width = self.transformer.transformer_blocks, self.transformer.inner_dim
        if not 1 <= tail_blocks < len(blocks):
            raise ValueError(f"tail_blocks: expected 1 to {len(blocks) - 1}, fewer than the DiT's blocks, found {tail_blocks}")
        if self.transformer.out_channels != in_channels:
            raise ValueError(f"out_channels: expected {in_channels}, as in_channels, found {self.transformer.out_channels}")
        without_label_dropout(self)
        self.first_of_tail = len(blocks) - tail_blocks
        cut = Cut(
            feature_channels=width,
            feature_stride=1,
            embedding_dim=width,
            places={f"block{index}": width for index in range(self.first_of_tail, len(blocks))},
            modulation_size=0,
            last_channels=width,
            out_channels=in_channels,
            norm_num_groups=math.gcd(MOST_GROUPS, width),
            patch_size=self.transformer.patch_size,
        )
        self.mixture = Mixture(cut, self.config)

    @classmethod
    def from_transformer(cls, folder: str | Path, **mixture: int) -> ExtendedDiTTransformer2DModel:
        """Load the DiTTransformer2DModel of a folder and give it a new mixture of these sizes.

        Output channels beyond the latents', in which ImageNet's DiTs predict a variance, are dropped: a mixture needs none.
        """
        dit = DiTTransformer2DModel.from_pretrained(folder, use_safetensors=True)
        channels, weights = dit.config.in_channels, dit.state_dict()
        for name in ("proj_out_2.weight", "proj_out_2.bias"):
            rows = weights[name].unflatten(0, (-1, dit.out_channels))  # of each position in a patch
            weights[name] = rows[:, :channels].flatten(0, 1)
        config = plain_config(dit) | {"out_channels": channels}
        sizes = {"sample_size": dit.config.sample_size, "in_channels": channels, "num_classes": dit.config.num_embeds_ada_norm}
        model = cls(transformer_config=config, **sizes, **mixture)
        model.transformer.load_state_dict(weights)
        return model

    def trunk(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> Trunk:
        dit, patch = self.transformer, self.transformer.patch_size
        if image_embeds is not None:
            raise ValueError("image_embeds: expected None, this model is not conditioned on embeddings")
        if sample.shape[2] % patch or sample.shape[3] % patch:
            raise ValueError(f"sample: expected sides that are multiples of {patch}, found {tuple(sample.shape[2:])}")
        labels = cast(torch.Tensor, null_labels(self, sample) if class_labels is None else class_labels)
        timestep = timestep.expand(len(sample))
        tokens = dit.pos_embed(sample)
        for block in dit.transformer_blocks[: self.first_of_tail]:
            tokens = self._run(block, tokens, timestep, labels)
        embedding = F.silu(dit.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=tokens.dtype))
        return Trunk(rearrange(tokens, "b (h w) c -> b c h w", h=sample.shape[2] // patch), embedding, (timestep, labels))

    def tail(self, trunk: Trunk, draws: Draws) -> torch.Tensor:
        dit, h = self.transformer, trunk.features
        timestep, labels = (draws.repeat(each) for each in cast(tuple[torch.Tensor, torch.Tensor], trunk.kept))
        rows = h.shape[2]
        for index in range(self.first_of_tail, len(dit.transformer_blocks)):
            h = draws.at(f"block{index}", h)
            if index == len(dit.transformer_blocks) - 1:
                h = draws.with_noise(h)
            tokens = self._run(dit.transformer_blocks[index], rearrange(h, "b c h w -> b (h w) c"), timestep, labels)
            h = rearrange(tokens, "b (h w) c -> b c h w", h=rows)
        shift, scale = dit.proj_out_1(draws.repeat(trunk.embedding)).chunk(2, dim=1)
        tokens = dit.proj_out_2(torch.addcmul(shift[:, None], dit.norm_out(tokens), 1 + scale[:, None]))
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=dit.patch_size, q=dit.patch_size).contiguous()

    def _run(self, block: torch.nn.Module, tokens: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """With gradient checkpointing again in the backward pass, instead of keeping all that the block computes."""
        again = self.transformer.gradient_checkpointing and torch.is_grad_enabled()
        run = self.transformer._gradient_checkpointing_func if again else lambda block, *given: block(*given)
        # (attention mask, states and mask to attend to, timestep, attention options, labels)
        return run(block, tokens, None, None, None, timestep, None, labels)


def without_label_dropout(model: ModelMixin) -> ModelMixin:
    """Let a DiT in ``model`` leave out no labels by itself: the training does, with random numbers that it can draw again."""
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model
