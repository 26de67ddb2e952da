"""Settings of the networks: the SMD UNet and the autoencoder."""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from ..schema import Settings, check, choice, number

AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC")
PLACEMENTS = ("in_out", "up", "all")
ATTENTION_BACKENDS = ("auto", "sdpa", "xformers")


@dataclass
class ModelConfig(Settings):
    """Settings of SMDUNet2DModel. Latent size and channels and the number of classes come from the shards."""

    RENAMED = {"latent_channels": "z_channels"}

    block_out_channels: list[int] = number([128, 256], 1, 8192, min_length=1)
    layers_per_block: int = number(2, 1, 32)
    up_layers_per_block: int = number(1, 1, 32)
    """Residual blocks per level of the decoder path, at most layers_per_block. The decoder path runs once for each draw."""
    attention_levels: list[int] = number([1], 0, 32)
    attention_head_dim: int = number(32, 1, 1024)
    norm_num_groups: int = number(16, 1, 4096)
    dropout: float = number(0.0, 0, 0.95)
    z_channels: int = number(32, 0, 4096)
    """Channels of the mixture's latent variable z. 0: a Gaussian model, without g_xi and f_phi."""
    identifier_channels: int = number(32, 1, 4096)
    """Width of g_xi, the network that makes z."""
    hypernetwork_width: int = number(64, 1, 4096)
    """Width of f_phi, the hypernetworks that apply z."""
    tail_blocks: int = number(4, 1, 1024)
    """For a network of diffusers (init_from): number of last transformer blocks, or last up blocks of a UNet, that run once for
    each draw. Fewer are cheaper to train. A UNet with fewer up blocks uses all of them."""
    placement: str = choice("up", PLACEMENTS)
    """Where the hypernetworks act. in_out: as in the paper. up: in the decoder path, so that the encoder path runs once for all
    draws. all: both, and the encoder path."""
    noise_rank: int = number(128, 0, 2**16)
    """Number of principal components of the latents in the fitted noise (ldm_smd/models/noise.py). 0: white noise, as in the
    paper."""
    noise_modes: int = number(256, 1, 2**16)
    """Components of the Gaussian mixture fitted to the latents in these directions. 1: a single Gaussian."""

    def unet_arguments(self) -> dict[str, Any]:
        """Return the arguments for SMDUNet2DModel."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tail_blocks"}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def __post_init__(self) -> None:
        super().__post_init__()
        up, most = self.up_layers_per_block, self.layers_per_block
        check(up <= most, "model.up_layers_per_block", f"at most layers_per_block={most}", up)
        levels = len(self.block_out_channels)
        for level, channels in enumerate(self.block_out_channels):
            check_multiple(channels, "norm_num_groups", self.norm_num_groups)
            if level in self.attention_levels or level == levels - 1:
                check_multiple(channels, "attention_head_dim", self.attention_head_dim, " where attention is")


@dataclass
class AutoencoderModelConfig(Settings):
    """Settings of the autoencoder. Each entry of ``block_out_channels`` after the first halves the resolution."""

    kind: str = choice("AutoencoderKL", AUTOENCODERS)
    """Class of diffusers. AutoencoderDC (deep compression) has no blocks at full resolution, which saves time on large images;
    it ignores the first entry of ``block_out_channels``."""
    block_out_channels: list[int] = number([32, 64, 128, 128], 1, 8192, min_length=1)
    layers_per_block: int = number(1, 1, 32)
    """Residual blocks per level of the encoder. The decoder of an AutoencoderKL has one more."""
    decoder_layers_per_block: int = number(2, 1, 32)
    """AutoencoderDC only: residual blocks per level of the decoder."""
    latent_channels: int = number(16, 1, 4096)
    norm_num_groups: int = number(8, 1, 4096)
    """AutoencoderKL only."""
    mid_block_add_attention: bool = True
    """AutoencoderKL only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "AutoencoderKL":
            for channels in self.block_out_channels:
                check_multiple(channels, "norm_num_groups", self.norm_num_groups)
            return
        # The shortcuts of AutoencoderDC average or repeat channels.
        for above, below in pairwise(self.block_out_channels[1:]):
            check(4 * above % below == 0, "model.block_out_channels", f"a divisor of {4 * above} after {above}", below)
        last, latent = self.block_out_channels[-1], self.latent_channels
        check(len(self.block_out_channels) > 1, "model.block_out_channels", "two levels or more", self.block_out_channels)
        check(last % latent == 0, "model.block_out_channels", f"a multiple of latent_channels={latent} at the end", last)


def check_multiple(channels: int, name: str, divisor: int, where: str = "") -> None:
    """Raise UserError unless ``channels`` is a multiple of the setting ``name``."""
    check(channels % divisor == 0, "model.block_out_channels", f"multiples of {name}={divisor}{where}", channels)
