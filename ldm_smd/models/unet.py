"""SMDUNet2DModel: a UNet whose prediction depends on a draw ``eta``, so that it stands for a mixture; diffusers' interface."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..choices import PLACEMENTS
from .blocks import (
    AttentionBlock,
    Downsample,
    Pointwise,
    ResidualBlock,
    assign_modulation_slices,
    repeat,
    upsample,
    zero_init,
)
from .hypernetwork import HyperNetwork, MixtureIdentifier
from .noise import PosteriorNoise

MIXTURE_PARTS = ("identifier.", "hyper.")
"""Where the names of the weights begin that a mixture model has and the Gaussian model it extends has not."""

EMBEDDING_PARTS = ("image_embedding.",)
"""Those that a model conditioned on embeddings has and others have not."""

FITTED_PARTS = ("hyper.noise.",)
"""Those of them that are fitted to the latents at hand and not trained."""


class SMDUNet2DModel(ModelMixin, ConfigMixin):
    """A UNet with AdaGN residual blocks, self-attention, class embedding and soft mixture denoising.

    ``forward(x, t, labels, eta)`` returns one component's prediction for every ``eta``; over ``eta ~ N(0, I)`` these are a
    mixture (arXiv 2309.14068). With ``latent_channels=0`` there is no mixture part and ``eta`` is not read: the Gaussian
    baseline, the same code otherwise.

    Args:
        sample_size: side of the latents in training; others work too.
        in_channels, out_channels: channels of the latents.
        block_out_channels: channels of each level; every level but the last halves the sides.
        layers_per_block: residual blocks of a level on the way down.
        up_layers_per_block: residual blocks of a level on the way up, not more than on the way down. With "up" the way up is
            what M draws repeat, so few blocks there make draws cheap.
        attention_levels: the levels (0 is the finest) with attention after each residual block. The middle always has it.
        attention_head_dim: channels per attention head.
        num_classes: number of classes, or None for an unconditional model. A label equal to ``num_classes`` is the null
            class: "no label".
        norm_num_groups: groups of every GroupNorm.
        dropout: inside the residual blocks.
        latent_channels: channels of the mixture's latent map z; 0 for a Gaussian model.
        identifier_channels: width of g_xi, which makes z (MixtureIdentifier).
        hypernetwork_width: width of f_phi, which applies z (HyperNetwork).
        noise_rank: principal components of the latents that a draw chooses in (PosteriorNoise; ``hyper["noise"].fit`` comes
            before training); 0: white noise, the paper's.
        noise_modes: of the Gaussian mixture that the latents are taken to be from in those directions.
        noise_timesteps: of the noise schedule it is fitted for.
        embedding_dimensions: D of the OpenCLIP embeddings that it can be conditioned on; None where it cannot.
        placement: where f_phi acts. "in_out" (the paper): after the first and before the last convolution. "up": before
            each level on the way up but the last, so that the way down and the middle, the trunk, run once for any number of
            draws. "all": "in_out", "up" and before each level on the way down. With "up" and "all" z also shifts the
            modulation of the way up.

    Beside z, the noise itself enters before the last level on the way up and, through a gate by t and class, at the output.
    """

    _supports_gradient_checkpointing = True
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
        latent_channels: int = 32,
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
        # No bias: that of no embedding is zero. And zero it starts, as a model without embeddings.
        self.image_embedding = None
        if embedding_dimensions is not None:
            self.image_embedding = zero_init(nn.Linear(embedding_dimensions, embedding_dim, bias=False))

        # Way down. The outputs of the residual blocks are kept for the way up.
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        channels = first
        self.down = nn.ModuleList()
        for level, out in enumerate(block_out_channels):
            stage = Stage()
            for _ in range(layers_per_block):
                stage.add(ResidualBlock(channels, out, groups, dropout), out, level, attention_levels, attention_head_dim)
                channels = out
            if level < levels - 1:
                stage.downsample = Downsample(channels)
            self.down.append(stage)

        self.middle = nn.ModuleList(
            (
                ResidualBlock(last, last, groups, dropout),
                AttentionBlock(last, attention_head_dim, groups),
                ResidualBlock(last, last, groups, dropout),
            )
        )

        # Way up, coarsest level first.
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            stage, out = Stage(), block_out_channels[level]
            if level < levels - 1:
                # Before the upsampling, where it costs a quarter: the blocks after it then work on fewer channels.
                stage.project = nn.Conv2d(channels, out, 1)
            for _ in range(up_layers_per_block):
                block = ResidualBlock(out, out, groups, dropout, skip_channels=out)
                stage.add(block, out, level, attention_levels, attention_head_dim)
            channels = out
            self.up.append(stage)
        self.norm_out = nn.GroupNorm(groups, first)
        self.conv_out = zero_init(nn.Conv2d(first, out_channels, 3, padding=1))

        ways = (nn.ModuleList((self.down, self.middle)), self.up)
        self.modulation_sizes = [assign_modulation_slices(way) for way in ways]
        self.modulation = nn.Linear(embedding_dim, sum(self.modulation_sizes))

        # The mixture: noise e from eta, z = g_xi(e, x_t, t), and f_phi(z) at the places of its choice.
        self.identifier: MixtureIdentifier | None = None
        self.hyper = nn.ModuleDict()
        if latent_channels > 0:
            # Before the last level the noise itself enters; but a single level is not left without z.
            ups = {f"up{index}": out for index, out in enumerate(reversed(block_out_channels[1:] or block_out_channels))}
            downs = {f"down{level}": block_out_channels[level - 1] for level in range(1, levels)}
            ends = {"in": first, "out": first}
            places = {"in_out": ends, "up": ups, "all": ends | downs | ups}[placement]
            for name, width in places.items():
                self.hyper[name] = HyperNetwork(width, latent_channels, hypernetwork_width, groups)
            self.identifier = MixtureIdentifier(
                feature_channels=last if placement == "up" else first,
                stride=1 if placement == "up" and levels > 1 else 2,
                noise_channels=in_channels,
                embedding_dim=embedding_dim,
                channels=identifier_channels,
                latent_channels=latent_channels,
            )
            self.hyper["noise"] = PosteriorNoise(
                in_channels, sample_size, noise_rank, noise_modes, num_classes, noise_timesteps
            )
            self.hyper["draft"] = zero_init(Pointwise(in_channels, first, bias=False))
            self.hyper["gate"] = zero_init(nn.Linear(embedding_dim, out_channels))
        if latent_channels > 0 and placement != "in_out":
            self.hyper["modulation"] = zero_init(nn.Linear(latent_channels, self.modulation_sizes[1]))

    @property
    def is_mixture(self) -> bool:
        return self.identifier is not None

    @property
    def noise(self) -> PosteriorNoise:
        """The posterior noise of a mixture model."""
        return cast(PosteriorNoise, self.hyper["noise"])

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        eta: torch.Tensor | None = None,
        return_dict: bool = True,
        image_embeds: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict for every picture and draw.

        Args:
            sample: x_t, (B, C, H, W).
            timestep: a number, or (B,).
            class_labels: (B,) integers, ``num_classes`` for the null class; None is the null class for all.
            eta: (B * M, C, H, W) with the M draws of a picture in consecutive rows; None draws one for each picture.
                Not read by a Gaussian model.
            image_embeds: of the picture to be like, (B, D), of length 1; rows of zeros, or None for all, are no embedding.

        Returns:
            The prediction (B * M, C, H, W), rows as in ``eta``; (B, C, H, W) for a Gaussian model.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # one number stays one: less work
        embedding = F.silu(self._embed(sample, timestep, class_labels, image_embeds))
        modulation, up_modulation = self.modulation(embedding).split(self.modulation_sizes, dim=1)
        # The layout of the input is that of every feature map after it. Channels last is what GPUs' tensor cores want, and
        # on CPUs it is 1.1 times faster in training, as attention needs no copies (benchmarks/unet_throughput.py).
        h = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        z: torch.Tensor | None = None
        draws = 1
        if self.is_mixture:
            noise = self.noise(eta, sample, timestep, class_labels)
            draws = len(noise) // len(sample)
        if self.identifier is not None and self.config.placement != "up":
            z = self.identifier(noise, h, embedding)
            modulation = repeat(modulation, draws)
        h, kept = self._way_down(self._hyper("in", h, z), modulation, z)
        if self.identifier is not None and z is None:
            z = self.identifier(noise, h, embedding)  # from here on there are M rows a picture
        up_modulation = repeat(up_modulation, draws)
        if z is not None and "modulation" in self.hyper:
            up_modulation = up_modulation + self.hyper["modulation"](z.mean(dim=(2, 3)))
        for index, stage in enumerate(cast(Iterable[Stage], self.up)):
            skips = kept.pop()
            if stage.project is not None:
                h = upsample(stage.project(h), skips[0])
            h = self._hyper(f"up{index}", h, z)
            if self.is_mixture and index == len(self.up) - 1:
                h = cast(Pointwise, self.hyper["draft"]).added_to(h, noise)
            for block, attend, skip in zip(stage.blocks, stage.attentions, reversed(skips)):
                h = self._run(block, attend, h, up_modulation, skip)
        h = self._hyper("out", h, z)
        prediction = self.conv_out(F.silu(self.norm_out(h))).contiguous()
        if self.is_mixture:
            gate = repeat(self.noise.start + self.hyper["gate"](embedding), draws)
            prediction = torch.addcmul(prediction, gate[..., None, None], noise)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def _embed(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype)).expand(len(sample), -1)
        if self.class_embedding is None and class_labels is not None:
            raise ValueError("class_labels: expected None, this model has num_classes=None")
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((len(sample),), self.config.num_classes, device=sample.device)
            embedding = embedding + self.class_embedding(class_labels)
        if image_embeds is None:
            return embedding
        if self.image_embedding is None:
            raise ValueError("image_embeds: expected None, this model has embedding_dimensions=None")
        # Of unit variance, as the other inputs of the first layers.
        unit = image_embeds.to(embedding.dtype) * math.sqrt(self.config.embedding_dimensions)
        return embedding + self.image_embedding(unit)

    def _way_down(
        self, h: torch.Tensor, modulation: torch.Tensor, z: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """The output of the middle, and of each level what its blocks put out."""
        kept: list[list[torch.Tensor]] = []
        for index, stage in enumerate(cast(Iterable[Stage], self.down)):
            h = self._hyper(f"down{index}", h, z)
            kept.append([])
            for block, attend in zip(stage.blocks, stage.attentions):
                h = self._run(block, attend, h, modulation)
                kept[-1].append(h)
            if stage.downsample is not None:
                h = stage.downsample(h)
        first, attend, second = self.middle
        return self._run(second, nn.Identity(), self._run(first, attend, h, modulation), modulation), kept

    def _run(self, block: nn.Module, attend: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Both, and with gradient checkpointing again on the way back, where else all they compute would have been kept."""

        def both(*values: torch.Tensor) -> torch.Tensor:
            return attend(block(*values))

        again = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func(both, *inputs) if again else both(*inputs)

    def _hyper(self, place: str, h: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        return self.hyper[place](h, z) if place in self.hyper else h


class Stage(nn.Module):
    """One level, one way: residual blocks, each followed by attention or nothing; on the way down, what halves the sides
    at the end, or None; on the way up, what brings the channels to the level's at the start, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attentions = nn.ModuleList()
        self.downsample: nn.Module | None = None
        self.project: nn.Module | None = None

    def add(self, block: ResidualBlock, channels: int, level: int, attention_levels: tuple[int, ...], head_dim: int) -> None:
        groups = block.norm2.num_groups
        self.blocks.append(block)
        self.attentions.append(AttentionBlock(channels, head_dim, groups) if level in attention_levels else nn.Identity())
