"""Mixture: everything that soft mixture denoising (arXiv 2309.14068) adds to a denoiser, independent of its network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from torch import nn

from .blocks import Pointwise, repeat, zero_init
from .hypernetwork import HyperNetwork, MixtureIdentifier
from .noise import PosteriorNoise


@dataclass(frozen=True)
class Cut:
    """Where a network is cut into trunk and tail, and where draws enter the tail.

    Attributes:
        feature_channels: channels of the trunk's features, the input of g_xi.
        feature_stride: downsampling from these features to z: 1, or 2 if they are at full resolution.
        embedding_dim: length of the embedding of timestep and class.
        places: name -> channels, of the feature maps that f_phi acts on.
        modulation_size: length of the modulation vector that z shifts; 0 for none.
        last_channels: channels of the feature map that the noise is added to.
        out_channels: channels of the prediction.
        norm_num_groups: groups of f_phi's GroupNorm.
        patch_size: latent positions per position of these feature maps, along each side.
    """

    feature_channels: int
    feature_stride: int
    embedding_dim: int
    places: dict[str, int]
    modulation_size: int
    last_channels: int
    out_channels: int
    norm_num_groups: int
    patch_size: int = 1


class Draws:
    """Interface by which a tail applies its draws. This class is for Gaussian models, whose single draw has no effect."""

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        """Repeat (B, ...) to (B * M, ...), the M draws of an image in consecutive rows."""
        return x

    def at(self, place: str, h: torch.Tensor) -> torch.Tensor:
        """Apply f_phi(z) to the feature map at ``place``: (B, C, H, W) or (B * M, C, H, W) -> (B * M, C, H, W)."""
        return h

    def modulated(self, modulation: torch.Tensor) -> torch.Tensor:
        """Shift the modulation vector of the tail by z: (B, size) -> (B * M, size)."""
        return modulation

    def with_noise(self, h: torch.Tensor) -> torch.Tensor:
        """Add the noise to the last feature map of the tail, (B * M, C, H, W)."""
        return h


class MixtureDraws(Draws):
    """M draws per image: noise e (B * M, C, H, W), the same as patches (B * M, C p^2, H / p, W / p), and z
    (B * M, z_channels, h, w)."""

    def __init__(self, mixture: Mixture, noise: torch.Tensor, patches: torch.Tensor, z: torch.Tensor, count: int) -> None:
        self.mixture, self.noise, self.patches, self.z, self.count = mixture, noise, patches, z, count

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        return repeat(x, self.count)

    def at(self, place: str, h: torch.Tensor) -> torch.Tensor:
        return self.mixture.hypernetworks[place](h, self.z) if place in self.mixture.hypernetworks else h

    def modulated(self, modulation: torch.Tensor) -> torch.Tensor:
        modulation = self.repeat(modulation)
        shift = self.mixture.modulation
        return modulation if shift is None else modulation + shift(self.z.mean(dim=(2, 3)))

    def with_noise(self, h: torch.Tensor) -> torch.Tensor:
        return self.mixture.noise_skip(self.patches, onto=h)


class Mixture(nn.Module):
    """Maps a draw eta to the prediction of a mixture component. All parts but the noise start at zero, so a new mixture is the
    original network with the noise e added to its prediction:

        e = noise(eta, x_t, t),    z = g_xi(e, trunk(x_t, t)),    p = tail(trunk(x_t, t), f_phi(z), e) + gate(t) e

    Attributes:
        noise: makes e, a draw of the principal components of the latents given x_t.
        identifier: g_xi.
        hypernetworks: f_phi, one per place in the tail.
        modulation: maps the mean of z to a shift of the tail's modulation, or None.
        noise_skip: maps e to the last feature map of the tail.
        gate: maps the embedding of timestep and class to the weight of e in each channel of the prediction.
    """

    def __init__(self, cut: Cut, config: FrozenDict) -> None:
        """``config``: config of the network, with ``z_channels``, ``identifier_channels``, ``hypernetwork_width`` and
        ``noise_*`` (see SMDUNet2DModel)."""
        super().__init__()
        self.patch_size, z_channels, in_channels = cut.patch_size, config.z_channels, config.in_channels
        noise_channels = in_channels * cut.patch_size**2
        self.hypernetworks = nn.ModuleDict()
        for place, channels in cut.places.items():
            self.hypernetworks[place] = HyperNetwork(channels, z_channels, config.hypernetwork_width, cut.norm_num_groups)
        features = (cut.feature_channels, cut.feature_stride, noise_channels, cut.embedding_dim)
        self.identifier = MixtureIdentifier(*features, config.identifier_channels, z_channels)
        modes, timesteps = config.noise_modes, config.noise_timesteps
        self.noise = PosteriorNoise(in_channels, config.sample_size, config.noise_rank, modes, config.num_classes, timesteps)
        self.noise_skip = zero_init(Pointwise(noise_channels, cut.last_channels, bias=False))
        self.gate = zero_init(nn.Linear(cut.embedding_dim, cut.out_channels))
        self.modulation = zero_init(nn.Linear(z_channels, cut.modulation_size)) if cut.modulation_size else None

    def draw(
        self,
        eta: torch.Tensor | None,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        features: torch.Tensor,
        embedding: torch.Tensor,
    ) -> MixtureDraws:
        """Make the draws for eta (B * M, C, H, W), or one random draw per image for None.

        x_t, t and labels are the arguments of ``Backbone.trunk``, features and embedding its result.
        """
        noise = self.noise(eta, sample, timestep, class_labels)
        patches = noise if self.patch_size == 1 else F.pixel_unshuffle(noise, self.patch_size)
        z = self.identifier(patches, features, embedding)
        return MixtureDraws(self, noise, patches, z, len(noise) // len(sample))

    def gated(self, prediction: torch.Tensor, draws: MixtureDraws, embedding: torch.Tensor) -> torch.Tensor:
        """Add the noise to the prediction of the tail (B * M, C, H, W), with a gate per channel."""
        gate = draws.repeat(self.noise.initial_gate + self.gate(embedding))
        return torch.addcmul(prediction, gate[..., None, None], draws.noise)
