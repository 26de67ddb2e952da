"""Soft mixture denoising (arXiv 2309.14068): which component of the mixture (g_xi), and what it does (f_phi)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import AttentionBlock, Downsample, ResidualBlock, upsample, zero_init


class MixtureIdentifier(nn.Module):
    """z = g_xi(eta, x_t, t): the latent variable of the mixture, a map with ``latent_channels`` channels.

    A small UNet with one lower level and attention. Which mode a *picture* takes is a global choice, but an i.i.d. map of
    noise, as in the paper, lets every place choose alone: the draws fall into blobs that do not agree. So of ``eta`` the
    network reads the mean over all places, scaled back to unit variance, the same numbers at every place.
    """

    def __init__(self, in_channels: int, channels: int, latent_channels: int, groups: int, head_dim: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2 * in_channels, channels, 3, padding=1)
        self.encode = ResidualBlock(channels, channels, groups)
        self.down = Downsample(channels)
        self.middle1 = ResidualBlock(channels, 2 * channels, groups)
        self.attention = AttentionBlock(2 * channels, head_dim, groups)
        self.middle2 = ResidualBlock(2 * channels, 2 * channels, groups)
        self.decode = ResidualBlock(3 * channels, channels, groups)
        self.norm_out = nn.GroupNorm(groups, channels)
        self.conv_out = nn.Conv2d(channels, latent_channels, 3, padding=1)

    def forward(self, eta: torch.Tensor, x_t: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """eta, x_t (B, C, H, W), modulation (B, total) from the embedding of t -> z (B, latent_channels, H, W)."""
        places = eta.shape[2] * eta.shape[3]
        overall = (eta.mean(dim=(2, 3), keepdim=True) * math.sqrt(places)).expand_as(eta)
        joined = torch.cat((x_t, overall), dim=1).contiguous(memory_format=torch.channels_last)
        fine = self.encode(self.conv_in(joined), modulation)
        coarse = self.middle1(self.down(fine), modulation)
        coarse = self.middle2(self.attention(coarse), modulation)
        h = self.decode(torch.cat((upsample(coarse, fine), fine), dim=1), modulation)
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
        """h (B, channels, H', W'), z (B, latent_channels, H, W) -> (B, channels, H', W')."""
        if z.shape[2:] != h.shape[2:]:
            z = F.adaptive_avg_pool2d(z, h.shape[2:])
        y = self.linear_in(self.norm(h))
        for v, c in zip(self.linear_v(z).chunk(self.LAYERS, dim=1), F.softplus(self.c)):
            projection = (v * y).sum(dim=1, keepdim=True) / math.sqrt(self.width)
            y = torch.addcmul(c * y, v, projection)
        return h + self.linear_out(y)
