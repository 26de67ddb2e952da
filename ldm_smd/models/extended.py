"""ExtendedUNet2DModel: a Gaussian diffusers.UNet2DModel, trained elsewhere, extended to a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from .blocks import Pointwise, repeat, zero_init
from .hypernetwork import HyperNetwork, MixtureIdentifier
from .noise import PosteriorNoise


class ExtendedUNet2DModel(ModelMixin, ConfigMixin):
    """A ``diffusers.UNet2DModel`` with the mixture of SMDUNet2DModel, placement "up": same ``forward``, same ``config`` names
    where pipelines read them.

    The mixture's parts start at zero, so that it equals the UNet at first. ``self.unet`` stays a plain UNet2DModel, which
    can be saved by itself.

    Args:
        unet_config: of the UNet2DModel. Positional time embedding, blocks without ``skip_conv``, ``class_embed_type``
            None.
        sample_size, in_channels: of the UNet.
        num_classes: number of classes, one less than the UNet's ``num_class_embeds``, whose last is "no label"; None for an
            unconditional UNet.
        latent_channels, identifier_channels, hypernetwork_width, noise_rank, noise_modes, noise_timesteps: as in
            SMDUNet2DModel.
    """

    _supports_gradient_checkpointing = True  # of its UNet's blocks

    @register_to_config
    def __init__(
        self,
        unet_config: dict,
        sample_size: int,
        in_channels: int,
        num_classes: int | None = None,
        latent_channels: int = 32,
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
        last, embedding_dim = config.block_out_channels[-1], self.unet.time_embedding.linear_2.out_features
        self.identifier = MixtureIdentifier(
            feature_channels=last,
            stride=1,
            noise_channels=in_channels,
            embedding_dim=embedding_dim,
            channels=identifier_channels,
            latent_channels=latent_channels,
        )
        # What an up block takes in is what the one before it put out.
        widths = (last, *reversed(config.block_out_channels))[: len(self.unet.up_blocks)]
        self.hyper = nn.ModuleDict(
            {
                f"up{index}": HyperNetwork(width, latent_channels, hypernetwork_width, config.norm_num_groups)
                for index, width in enumerate(widths[:-1] or widths)
            }
        )
        self.hyper["embedding"] = zero_init(nn.Linear(latent_channels, embedding_dim))
        self.hyper["noise"] = PosteriorNoise(in_channels, sample_size, noise_rank, noise_modes, num_classes, noise_timesteps)
        self.hyper["draft"] = zero_init(Pointwise(in_channels, widths[-1], bias=False))
        self.hyper["gate"] = zero_init(nn.Linear(embedding_dim, config.out_channels))

    @classmethod
    def from_unet(cls, folder: str | Path, **mixture: int) -> ExtendedUNet2DModel:
        """The UNet2DModel of a folder, with a new mixture of these sizes."""
        unet = UNet2DModel.from_pretrained(folder, use_safetensors=True)
        embeds = unet.config.num_class_embeds
        model = cls(
            unet_config=plain_config(unet),
            sample_size=unet.config.sample_size,
            in_channels=unet.config.in_channels,
            num_classes=None if embeds is None else embeds - 1,
            **mixture,
        )
        model.unet.load_state_dict(unet.state_dict())
        return model

    @property
    def is_mixture(self) -> bool:
        return True

    @property
    def noise(self) -> PosteriorNoise:
        return cast(PosteriorNoise, self.hyper["noise"])

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        eta: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """As SMDUNet2DModel.forward: sample (B, C, H, W), eta (B * M, C, H, W) -> (B * M, C, H, W)."""
        unet, batch = self.unet, len(sample)
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(batch)
        noise = self.noise(eta, sample, timesteps, class_labels)
        draws = len(noise) // batch
        if unet.config.center_input_sample:
            sample = 2 * sample - 1
        embedding = unet.time_embedding(unet.time_proj(timesteps).to(sample.dtype))
        if unet.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((batch,), self.config.num_classes, device=sample.device)
            embedding = embedding + unet.class_embedding(class_labels)

        h = unet.conv_in(sample)
        kept = [h]
        for block in unet.down_blocks:
            h, outputs = block(hidden_states=h, temb=embedding)
            kept.extend(outputs)
        if unet.mid_block is not None:
            h = unet.mid_block(h, embedding)

        activated = F.silu(embedding)
        gate = repeat(self.noise.start + self.hyper["gate"](activated), draws)
        z = self.identifier(noise, h, activated)  # from here on there are M rows a picture
        embedding = repeat(embedding, draws) + self.hyper["embedding"](z.mean(dim=(2, 3)))
        for index, block in enumerate(unet.up_blocks):
            count = len(block.resnets)
            skips = tuple(repeat(skip, draws) for skip in kept[-count:])
            del kept[-count:]
            if f"up{index}" in self.hyper:
                h = self.hyper[f"up{index}"](h, z)
            if index == len(unet.up_blocks) - 1:
                h = cast(Pointwise, self.hyper["draft"]).added_to(h, noise)
            h = block(h, skips, embedding)
        prediction = unet.conv_out(unet.conv_act(unet.conv_norm_out(h))).contiguous()
        prediction = torch.addcmul(prediction, gate[..., None, None], noise)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


def plain_config(unet: UNet2DModel) -> dict:
    """The UNet's config without what names its class and version."""
    return {name: value for name, value in unet.config.items() if not name.startswith("_")}


def class_of(folder: str) -> str | None:
    """The class that a diffusers model folder says it holds."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("_class_name") if path.is_file() else None
