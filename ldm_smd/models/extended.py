"""ExtendedUNet2DModel: extends a pretrained Gaussian UNet2DModel of diffusers to a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from .backbone import Backbone, Trunk
from .denoiser import null_labels, num_classes
from .mixture import Cut, Draws, Mixture
from .widened import with_null_class, without_variance


class ExtendedUNet2DModel(Backbone):
    """A ``diffusers.UNet2DModel`` with the mixture of SMDUNet2DModel, placement "up". It has the same ``forward``, and the same
    ``config`` names as far as pipelines use them. ``self.unet`` remains a plain UNet2DModel that can be saved by itself.

    Args:
        unet_config: config of the UNet2DModel. It needs a positional time embedding, blocks without ``skip_conv``, and
            ``class_embed_type`` None.
        sample_size, in_channels: those of the UNet.
        num_classes: number of classes, one less than the UNet's ``num_class_embeds``, the last of which is the null class;
            None for an unconditional UNet.
        tail_blocks: number of last up blocks that run once per draw; None for all.
        z_channels, identifier_channels, hypernetwork_width, noise_rank, noise_modes, noise_timesteps: as in SMDUNet2DModel.
    """

    _supports_gradient_checkpointing = True  # in the blocks of its UNet
    _no_split_modules = ["ResnetBlock2D"]
    mixture: Mixture

    @register_to_config
    def __init__(
        self,
        unet_config: dict,
        sample_size: int,
        in_channels: int,
        num_classes: int | None = None,
        tail_blocks: int | None = None,
        z_channels: int = 32,
        identifier_channels: int = 32,
        hypernetwork_width: int = 64,
        noise_rank: int = 128,
        noise_modes: int = 256,
        noise_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.unet = UNet2DModel.from_config(unet_config)
        config = self.unet.config
        skips = any(hasattr(block, "skip_conv") for block in (*self.unet.down_blocks, *self.unet.up_blocks))
        if config.time_embedding_type != "positional" or config.class_embed_type is not None or skips:
            raise ValueError("unet: expected positional time embedding, class_embed_type None and no skip blocks")
        self.first_of_tail = first_up_block(self.unet, tail_blocks)
        self.mixture = Mixture(cut_before_up_block(self.unet, self.first_of_tail), self.config)

    @classmethod
    def from_unet(cls, folder: str | Path, classes: int = 0, **mixture: int) -> ExtendedUNet2DModel:
        """Load the UNet2DModel in ``folder`` and add a new mixture with the arguments ``mixture``. If it has an embedding for
        each of ``classes`` and no more, add one for the null class."""
        unet = without_variance(with_null_class(UNet2DModel.from_pretrained(folder, use_safetensors=True), classes))
        sizes = {"sample_size": unet.config.sample_size, "in_channels": unet.config.in_channels}
        model = cls(unet_config=plain_config(unet), num_classes=num_classes(unet), **sizes, **mixture)
        model.unet.load_state_dict(unet.state_dict())
        return model

    def trunk(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> Trunk:
        unet = self.unet
        if image_embeds is not None:
            raise ValueError("image_embeds: expected None, this model is not conditioned on embeddings")
        if class_labels is not None and unet.class_embedding is None:
            raise ValueError("class_labels: expected None, this model has num_classes=None")
        embedding = unet.time_embedding(unet.time_proj(timestep.expand(len(sample))).to(sample.dtype))
        if unet.class_embedding is not None:
            embedding = embedding + unet.class_embedding(null_labels(self, sample) if class_labels is None else class_labels)
        h, skips = encoder_path(unet, sample, embedding, self.first_of_tail)
        return Trunk(h, F.silu(embedding), (embedding, skips))

    def tail(self, trunk: Trunk, draws: Draws) -> torch.Tensor:
        embedding, skips = cast(tuple[torch.Tensor, list[torch.Tensor]], trunk.kept)
        return decoder_path(self.unet, trunk.features, embedding, skips, draws, self.first_of_tail)


def first_up_block(unet: UNet2DModel | UNet2DConditionModel, tail_blocks: int | None) -> int:
    """Return the index of the first of the last ``tail_blocks`` up blocks; 0 for None, or if there are fewer."""
    count = len(unet.up_blocks)
    if tail_blocks is not None and tail_blocks < 1:
        raise ValueError(f"tail_blocks: expected at least 1, found {tail_blocks}")
    return 0 if tail_blocks is None else max(0, count - tail_blocks)


def cut_before_up_block(unet: UNet2DModel | UNet2DConditionModel, first: int) -> Cut:
    """Describe a cut before up block ``first``. z acts before each up block from there on except the last, and the noise
    enters before the last."""
    config, last = unet.config, unet.config.block_out_channels[-1]
    embedding_dim = unet.time_embedding.linear_2.out_features
    # The input channels of an up block are the output channels of the previous one.
    widths = (last, *reversed(config.block_out_channels))[: len(unet.up_blocks)]
    places = {f"up{index}": width for index, width in enumerate(widths)}
    inner = list(places)[first:-1] or [f"up{len(widths) - 1}"]
    return Cut(
        feature_channels=widths[first],
        feature_stride=2 if first else 1,
        embedding_dim=embedding_dim,
        places={name: places[name] for name in inner},
        modulation_size=embedding_dim,
        last_channels=widths[-1],
        out_channels=config.out_channels,
        norm_num_groups=config.norm_num_groups,
    )


def encoder_path(
    unet: UNet2DModel | UNet2DConditionModel,
    sample: torch.Tensor,
    embedding: torch.Tensor,
    first: int,
    states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the down blocks, the middle block, and the up blocks before ``first``, where the tail starts.

    Args:
        sample: x_t, (B, C, H, W).
        embedding: (B, E).
        states: what blocks with cross-attention attend to, (B, tokens, D).

    Returns:
        The feature map that the tail continues from, and the remaining skip connections.
    """
    h = unet.conv_in(2 * sample - 1 if unet.config.center_input_sample else sample)
    skips = [h]
    for block in unet.down_blocks:
        h, outputs = block(hidden_states=h, temb=embedding, **attended(block, states))
        skips.extend(outputs)
    if unet.mid_block is not None:
        h = unet.mid_block(h, embedding, **attended(unet.mid_block, states))
    for block in unet.up_blocks[:first]:
        h = up(block, h, embedding, skips, Draws(), states)
    return h, skips


def decoder_path(
    unet: UNet2DModel | UNet2DConditionModel,
    h: torch.Tensor,
    embedding: torch.Tensor,
    skips: list[torch.Tensor],
    draws: Draws,
    first: int,
    states: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the up blocks from ``first`` on, for every draw. Arguments as in ``encoder_path`` and from its result; returns
    (B * M, C, H, W)."""
    embedding, left = draws.modulated(embedding), list(skips)  # a copy, because ``up`` consumes it
    states = None if states is None else draws.repeat(states)
    for index in range(first, len(unet.up_blocks)):
        h = draws.at(f"up{index}", h)
        if index == len(unet.up_blocks) - 1:
            h = draws.with_noise(h)
        h = up(unet.up_blocks[index], h, embedding, left, draws, states)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h))).contiguous()


def up(
    block: nn.Module,
    h: torch.Tensor,
    embedding: torch.Tensor,
    skips: list[torch.Tensor],
    draws: Draws,
    states: torch.Tensor | None,
) -> torch.Tensor:
    """Run an up block. Removes its skip connections from the end of the list."""
    first = len(skips) - len(cast(nn.ModuleList, block.resnets))
    given = tuple(draws.repeat(skip) for skip in skips[first:])
    del skips[first:]
    # Upsample to the size of the next skip connections, so that any input size works.
    size = skips[-1].shape[2:] if skips else None
    return block(h, given, embedding, upsample_size=size, **attended(block, states))


def attended(block: nn.Module, states: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Return the extra argument for a block with cross-attention, {} for others."""
    return {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}


def plain_config(unet: ModelMixin) -> dict:
    """Return the config of a network without its class and version."""
    return {name: value for name, value in unet.config.items() if not name.startswith("_")}


def class_of(folder: str | Path) -> str | None:
    """Return the class name in the config.json of a diffusers model folder; None without one."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("_class_name") if path.is_file() else None
