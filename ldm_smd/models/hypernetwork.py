"""Soft mixture denoising (arXiv 2309.14068): which component of the mixture (g_xi), and what it does (f_phi)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import AttentionBlock, ResidualBlock, add_shared, assign_modulation_slices, repeat, zero_init


class MixtureIdentifier(nn.Module):
    """z = g_xi(e, x_t, t): the latent variable of the mixture, a map with ``latent_channels`` channels.

    What g_xi must know of x_t the trunk of the UNet knows already: it reads the trunk's features, once for all draws, and
    only what mixes them with the noise is done for every draw.

    Args:
        feature_channels: channels of the trunk's features.
        stride: 1, or 2 where the features are at full resolution and z is to have half the sides.
        noise_channels: channels of the noise e (PosteriorNoise).
        embedding_dim: length of the embedding of t and class.
    """

    def __init__(
        self,
        feature_channels: int,
        stride: int,
        noise_channels: int,
        embedding_dim: int,
        channels: int,
        latent_channels: int,
        head_dim: int,
    ) -> None:
        super().__init__()
        self.from_features = nn.Conv2d(feature_channels, channels, 2 * stride - 1, stride=stride, padding=stride - 1)
        self.from_noise = nn.Conv2d(noise_channels, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.block = ResidualBlock(channels, channels, groups=1)
        self.attention = AttentionBlock(channels, head_dim, groups=1)
        self.norm_out = nn.GroupNorm(1, channels)
        self.conv_out = nn.Conv2d(channels, latent_channels, 1)
        self.modulation = nn.Linear(embedding_dim, assign_modulation_slices(self))

    def forward(self, noise: torch.Tensor, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """e (B * M, C, H, W), features (B, feature_channels, h, w), embedding (B, embedding_dim), M rows a picture ->
        z (B * M, latent_channels, h / stride, w / stride)."""
        features = self.from_features(features)
        draws = len(noise) // len(features)
        noise = noise.contiguous(memory_format=torch.channels_last)
        h = add_shared(self.mix(F.adaptive_avg_pool2d(F.silu(self.from_noise(noise)), features.shape[2:])), features)
        h = self.attention(self.block(h, repeat(self.modulation(embedding), draws)))
        return self.conv_out(F.silu(self.norm_out(h)))


class HyperNetwork(nn.Module):
    """f_phi: at every place, z makes the weights of a small network that the features pass through, as a residual:

        h + Linear_out( W_2 W_1 Linear_in(norm(h)) ),    W_l = v_l v_l^T / sqrt(width) + softplus(c_l) I,   v_l = Linear_l(z)

    W_l is a width x width matrix per place that is never built: v v^T h = v (v . h). ``Linear_out`` starts at zero, so the
    mixture starts as the Gaussian model it extends.
    """

    LAYERS = 2

    def __init__(self, channels: int, latent_channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.GroupNorm(groups, channels)
        self.linear_in = nn.Conv2d(channels, width, 1)
        self.linear_v = nn.Conv2d(latent_channels, self.LAYERS * width, 1)
        self.c = nn.Parameter(torch.full((self.LAYERS,), math.log(math.e - 1.0)))  # softplus(c) = 1
        self.linear_out = zero_init(nn.Conv2d(width, channels, 1))

    def forward(self, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """h (B, channels, H', W') or (B * M, ...), z (B * M, latent_channels, H, W) -> (B * M, channels, H', W')."""
        size = h.shape[2:]
        if z.shape[2] > size[0] or z.shape[3] > size[1]:
            z = F.adaptive_avg_pool2d(z, size)
        v = self.linear_v(z)
        if v.shape[2:] != size:
            v = F.interpolate(v, size=size, mode="nearest")
        y = repeat(self.linear_in(self.norm(h)), len(z) // len(h))
        for v_l, c in zip(v.chunk(self.LAYERS, dim=1), F.softplus(self.c)):
            projection = (v_l * y).sum(dim=1, keepdim=True) / math.sqrt(self.width)
            y = torch.addcmul(c * y, v_l, projection)
        return add_shared(self.linear_out(y), h)
