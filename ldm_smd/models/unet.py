"""SMDUNet2DModel: a UNet with a random input ``eta`` that predicts a mixture; with the interface of diffusers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from .backbone import Backbone, Trunk
from .blocks import AttentionBlock, Downsample, ResidualBlock, assign_modulation_slices, zero_init
from .denoiser import null_labels
from .mixture import Cut, Draws, Mixture
from .settings import PLACEMENTS


class SMDUNet2DModel(Backbone):
    """A UNet with AdaGN residual blocks, self-attention, class embedding and soft mixture denoising.

    ``forward(x, t, labels, eta)`` returns a prediction for every ``eta``. Over ``eta ~ N(0, I)``, the predictions form a
    mixture (arXiv 2309.14068). With ``z_channels=0`` it is a Gaussian model, and ``eta`` is ignored.

    Args:
        sample_size: side of the latents in training. Other sizes work too.
        in_channels, out_channels: channels of the latents and of the prediction.
        block_out_channels: channels of each level; every level but the last halves the sides.
        layers_per_block: residual blocks per level of the encoder path.
        up_layers_per_block: residual blocks per level of the decoder path, at most layers_per_block. With placement "up" the
            decoder path runs once per draw, so few blocks make draws cheap.
        attention_levels: levels (0 is the finest) with attention after each residual block. The middle always has attention.
        attention_head_dim: channels per attention head.
        num_classes: number of classes, or None for an unconditional model. A label equal to ``num_classes`` is the null
            class.
        norm_num_groups: groups of every GroupNorm.
        dropout: dropout in the residual blocks.
        z_channels: channels of the mixture's latent variable z; 0 for a Gaussian model.
        identifier_channels: width of g_xi, which makes z (MixtureIdentifier).
        hypernetwork_width: width of f_phi, which applies z (HyperNetwork).
        noise_rank: principal components of the fitted noise (PosteriorNoise, fitted before training); 0 for white noise, as in
            the paper.
        noise_modes: components of the Gaussian mixture fitted to the latents in these directions.
        noise_timesteps: timesteps of the noise schedule that the noise is fitted for.
        embedding_dimensions: D of the OpenCLIP embeddings to condition on, or None.
        placement: where f_phi acts, and so where the network is cut. "in_out" (the paper): after the first and before
            the last convolution. "up": before each level of the decoder path except the last, so that the encoder path and
            the middle (the trunk) run once for all draws. "all": "in_out", "up" and before each level of the encoder
            path. With "up" and "all" z also shifts the modulation of the decoder path.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # it moves modules that are called; a Level is not, only what it holds
    _no_split_modules = ["ResidualBlock", "AttentionBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 16,
        out_channels: int = 16,
        block_out_channels: tuple[int, ...] = (128, 256),
        layers_per_block: int = 2,
        up_layers_per_block: int = 1,
        attention_levels: tuple[int, ...] = (1,),
        attention_head_dim: int = 32,
        num_classes: int | None = None,
        norm_num_groups: int = 16,
        dropout: float = 0.0,
        z_channels: int = 32,
        identifier_channels: int = 32,
        hypernetwork_width: int = 64,
        placement: str = "up",
        noise_rank: int = 128,
        noise_modes: int = 256,
        noise_timesteps: int = 1000,
        embedding_dimensions: int | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        if placement not in PLACEMENTS:
            raise ValueError(f"placement: expected one of {', '.join(PLACEMENTS)}, found {placement!r}")
        if not 1 <= up_layers_per_block <= layers_per_block:
            raise ValueError(
                f"up_layers_per_block: expected 1 to layers_per_block={layers_per_block}, found {up_layers_per_block}"
            )
        if any(channels % norm_num_groups for channels in block_out_channels):
            raise ValueError(
                f"block_out_channels: expected multiples of norm_num_groups={norm_num_groups}, found {list(block_out_channels)}"
            )
        groups, levels = norm_num_groups, len(block_out_channels)
        first, last = block_out_channels[0], block_out_channels[-1]
        embedding_dim = 4 * first

        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, embedding_dim)
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, embedding_dim)
        # Without bias, so that a zero embedding adds nothing. Starts at zero, like a model without embeddings.
        self.image_embedding = None
        if embedding_dimensions is not None:
            self.image_embedding = zero_init(nn.Linear(embedding_dimensions, embedding_dim, bias=False))

        # Encoder path. The outputs of its residual blocks are the skip connections of the decoder path.
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        channels = first
        self.down = nn.ModuleList()
        for index, out in enumerate(block_out_channels):
            level = Level()
            for _ in range(layers_per_block):
                level.add(ResidualBlock(channels, out, groups, dropout), index in attention_levels, attention_head_dim)
                channels = out
            if index < levels - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)

        first_block, attention = ResidualBlock(last, last, groups, dropout), AttentionBlock(last, attention_head_dim, groups)
        self.middle = nn.ModuleList((first_block, attention, ResidualBlock(last, last, groups, dropout)))

        # Decoder path, coarsest level first.
        self.up = nn.ModuleList()
        for index, out in reversed(list(enumerate(block_out_channels))):
            level = Level()
            if index < levels - 1:
                # Before the upsampling, where it costs a quarter. The blocks after it then have fewer channels.
                level.project = nn.Conv2d(channels, out, 1)
            for _ in range(up_layers_per_block):
                block = ResidualBlock(out, out, groups, dropout, skip_channels=out)
                level.add(block, index in attention_levels, attention_head_dim)
            channels = out
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, first)
        self.conv_out = zero_init(nn.Conv2d(first, out_channels, 3, padding=1))

        paths = (nn.ModuleList((self.down, self.middle)), self.up)
        self.modulation_sizes = [assign_modulation_slices(path) for path in paths]
        self.modulation = nn.Linear(embedding_dim, sum(self.modulation_sizes))

        self.cut_after_middle = placement == "up"
        self.mixture = None
        if z_channels > 0:
            # Before the last level the noise itself enters, unless it is the only level.
            ups = {f"up{index}": out for index, out in enumerate(reversed(block_out_channels[1:] or block_out_channels))}
            downs = {f"down{level}": block_out_channels[level - 1] for level in range(1, levels)}
            ends = {"in": first, "out": first}
            cut = Cut(
                feature_channels=last if self.cut_after_middle else first,
                feature_stride=1 if self.cut_after_middle and levels > 1 else 2,
                embedding_dim=embedding_dim,
                places={"in_out": ends, "up": ups, "all": ends | downs | ups}[placement],
                modulation_size=0 if placement == "in_out" else self.modulation_sizes[1],
                last_channels=first,
                out_channels=out_channels,
                norm_num_groups=groups,
            )
            self.mixture = Mixture(cut, self.config)

    def trunk(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> Trunk:
        embedding = F.silu(self._embed(sample, timestep, class_labels, image_embeds))
        modulations = self.modulation(embedding).split(self.modulation_sizes, dim=1)
        # All feature maps keep the memory layout of the input. Channels last suits the tensor cores of GPUs, and on CPUs
        # training is 1.1 times faster, because attention needs no copies (benchmarks/unet_throughput.py).
        h = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips: list[list[torch.Tensor]] = []
        if self.cut_after_middle:
            h, skips = self._encoder_path(h, modulations[0], Draws())
        return Trunk(h, embedding, SMDSkips(skips, *modulations))

    def tail(self, trunk: Trunk, draws: Draws) -> torch.Tensor:
        h, kept = trunk.features, cast(SMDSkips, trunk.kept)
        skips = kept.skips
        if not self.cut_after_middle:
            h, skips = self._encoder_path(draws.at("in", h), draws.repeat(kept.modulation), draws)
        modulation = draws.modulated(kept.up_modulation)
        for index, (level, level_skips) in enumerate(zip(cast(Iterable[Level], self.up), reversed(skips))):
            if level.project is not None:
                # Upsample to the size of the skip connections, so that any input size works. A convolution at the larger
                # size would take a sixth of the time of the whole network.
                h = F.interpolate(level.project(h), size=level_skips[0].shape[2:], mode="nearest")
            h = draws.at(f"up{index}", h)
            if index == len(self.up) - 1:
                h = draws.with_noise(h)
            for block, attend, skip in zip(level.blocks, level.attentions, reversed(level_skips)):
                h = self._run(block, attend, h, modulation, skip)
        h = draws.at("out", h)
        return self.conv_out(F.silu(self.norm_out(h))).contiguous()

    def _embed(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype)).expand(len(sample), -1)
        if self.class_embedding is None and class_labels is not None:
            raise ValueError("class_labels: expected None, this model has num_classes=None")
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(null_labels(self, sample) if class_labels is None else class_labels)
        if image_embeds is None:
            return embedding
        if self.image_embedding is None:
            raise ValueError("image_embeds: expected None, this model has embedding_dimensions=None")
        # Unit variance, like the other inputs of the first layers.
        unit = image_embeds.to(embedding.dtype) * math.sqrt(self.config.embedding_dimensions)
        return embedding + self.image_embedding(unit)

    def _encoder_path(
        self, h: torch.Tensor, modulation: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """Return the output of the middle and the skip connections of each level."""
        skips: list[list[torch.Tensor]] = []
        for index, level in enumerate(cast(Iterable[Level], self.down)):
            h = draws.at(f"down{index}", h)
            skips.append([])
            for block, attend in zip(level.blocks, level.attentions):
                h = self._run(block, attend, h, modulation)
                skips[-1].append(h)
            if level.downsample is not None:
                h = level.downsample(h)
        first, attend, second = self.middle
        return self._run(second, nn.Identity(), self._run(first, attend, h, modulation), modulation), skips

    def _run(self, block: nn.Module, attend: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Run a block and its attention, with gradient checkpointing if it is enabled."""

        def both(*values: torch.Tensor) -> torch.Tensor:
            return attend(block(*values))

        again = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func(both, *inputs) if again else both(*inputs)


@dataclass
class SMDSkips:
    """Further inputs of the tail: skip connections by level, and the modulations of both paths, (B, size)."""

    skips: list[list[torch.Tensor]]
    modulation: torch.Tensor
    up_modulation: torch.Tensor


class Level(nn.Module):
    """A level of the encoder or decoder path: residual blocks, each followed by attention or identity.

    In the encoder path, ``downsample`` follows them; in the decoder path, ``project`` changes the channels before them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attentions = nn.ModuleList()
        self.downsample: nn.Module | None = None
        self.project: nn.Module | None = None

    def add(self, block: ResidualBlock, attends: bool, head_dim: int) -> None:
        self.blocks.append(block)
        attention = AttentionBlock(block.out_channels, head_dim, block.norm2.num_groups) if attends else nn.Identity()
        self.attentions.append(attention)
