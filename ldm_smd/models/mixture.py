"""Mixture: all that soft mixture denoising (arXiv 2309.14068) adds to a denoiser, whatever network that is."""

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
    """Where a network is cut into trunk and tail, and where draws enter the tail: all a mixture knows of it beside its config.

    Attributes:
        feature_channels: channels of the trunk's features, which g_xi reads.
        feature_stride: 1, or 2 where those are at full resolution and z is to have half the sides.
        embedding_dim: length of the embedding of timestep and class.
        places: name -> channels of the feature maps that f_phi acts on.
        modulation_size: length of the modulation that z shifts; 0 for none.
        last_channels: channels of the feature map that the noise is added to.
        out_channels: channels of the prediction.
        norm_num_groups: groups of f_phi's GroupNorm.
        patch_size: latent positions, along a side, of one position of those feature maps.
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
    """What a tail asks about its draws; these are a Gaussian model's, whose one draw changes nothing."""

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B * M, ...), the M draws of an image in consecutive rows."""
        return x

    def at(self, place: str, h: torch.Tensor) -> torch.Tensor:
        """Apply f_phi(z) to the feature map of a place: (B, C, H, W) or (B * M, C, H, W) -> (B * M, C, H, W)."""
        return h

    def modulated(self, modulation: torch.Tensor) -> torch.Tensor:
        """Shift the tail's modulation by z: (B, size) -> (B * M, size)."""
        return modulation

    def with_noise(self, h: torch.Tensor) -> torch.Tensor:
        """Add the noise to the last feature map of the tail, (B * M, C, H, W)."""
        return h


class MixtureDraws(Draws):
    """M draws of each image: their noise e (B * M, C, H, W), the same in patches (B * M, C p^2, H / p, W / p), and z
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
        return self.mixture.noise_skip.added_to(h, self.patches)


class Mixture(nn.Module):
    """From a draw eta to a component's prediction, in four parts; all but the first start at zero, so that a new mixture is the
    network it is put into, with the noise e added to its prediction:

        e = noise(eta, x_t, t),    z = g_xi(e, trunk(x_t, t)),    p = tail(trunk(x_t, t), f_phi(z), e) + gate(t) e

    Attributes:
        noise: e, a draw of what x_t leaves open of the latents' principal components.
        identifier: g_xi.
        hypernetworks: f_phi, one for each place of the tail.
        modulation: from the mean of z to a shift of the tail's modulation, or None.
        noise_skip: from e to the last feature map of the tail.
        gate: from the embedding of timestep and class to the weight of e in each channel of the prediction.
    """

    def __init__(self, cut: Cut, config: FrozenDict) -> None:
        """``config`` is that of the network, with ``z_channels``, ``identifier_channels``, ``hypernetwork_width`` and
        ``noise_*`` (SMDUNet2DModel)."""
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
        """Make draws of eta (B * M, C, H, W), or one for each image where that is None. x_t, t and labels are those of
        ``Backbone.trunk``, features and embedding its Trunk's."""
        noise = self.noise(eta, sample, timestep, class_labels)
        patches = noise if self.patch_size == 1 else F.pixel_unshuffle(noise, self.patch_size)
        z = self.identifier(patches, features, embedding)
        return MixtureDraws(self, noise, patches, z, len(noise) // len(sample))

    def gated(self, prediction: torch.Tensor, draws: MixtureDraws, embedding: torch.Tensor) -> torch.Tensor:
        """Add the noise to the tail's prediction (B * M, C, H, W), each channel by its gate."""
        gate = draws.repeat(self.noise.initial_gate + self.gate(embedding))
        return torch.addcmul(prediction, gate[..., None, None], draws.noise)
