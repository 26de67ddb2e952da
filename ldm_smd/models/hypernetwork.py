"""The networks of soft mixture denoising (arXiv 2309.14068): g_xi makes the latent variable z, f_phi applies it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import Pointwise, add_shared, repeat, zero_init


class MixtureIdentifier(nn.Module):
    """z = g_xi(e, x_t, t): the latent variable of the mixture, a map with ``z_channels`` channels.

        z = Linear( silu( norm(conv(e) + Linear(features)) (1 + scale) + shift ) ),    scale, shift = Linear(embedding)

    g_xi gets its information on x_t from the features of the trunk, which are computed once for all draws. A single layer is
    enough, because the noise e is already consistent over positions (PosteriorNoise): a residual block and attention in its
    place do not improve the samples (docs/mixtures.md). Sizes are as in Cut; ``noise_channels`` are those of e.
    """

    def __init__(
        self, feature_channels: int, stride: int, noise_channels: int, embedding_dim: int, channels: int, z_channels: int
    ) -> None:
        super().__init__()
        self.stride = stride
        self.from_features = Pointwise(feature_channels, channels)
        self.from_noise = nn.Conv2d(noise_channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(1, channels, affine=False)
        self.modulation = nn.Linear(embedding_dim, 2 * channels)
        self.linear_out = Pointwise(channels, z_channels)

    def forward(self, noise: torch.Tensor, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Map e (B * M, C, H, W), features (B, feature_channels, h, w) and embedding (B, embedding_dim) to
        z (B * M, z_channels, h / stride, w / stride), sides rounded up."""
        if self.stride > 1:
            features = F.avg_pool2d(features, self.stride, ceil_mode=True)
        from_noise = self.from_noise(F.adaptive_avg_pool2d(noise, (features.shape[2], features.shape[3])))
        h = add_shared(from_noise, self.from_features(features))
        modulation = repeat(self.modulation(embedding), len(noise) // len(features))
        scale, shift = modulation[..., None, None].float().chunk(2, dim=1)
        return self.linear_out(F.silu(torch.addcmul(shift, self.norm(h), 1.0 + scale).to(h.dtype)))


class HyperNetwork(nn.Module):
    """f_phi: at every position, z determines the weights of a small network on the features, in a residual branch:

        h + Linear_out( W_2 W_1 Linear_in(norm(h)) ),    W_l = v_l v_l^T / sqrt(width) + softplus(c_l) I,   v_l = Linear_l(z)

    W_l is a width x width matrix per position. It is never materialised: v v^T h = v (v . h). ``Linear_out`` starts at zero, so
    the mixture starts as the Gaussian model that it extends.
    """

    LAYERS = 2

    def __init__(self, channels: int, z_channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.GroupNorm(groups, channels)
        self.linear_in = Pointwise(channels, width)
        self.linear_v = Pointwise(z_channels, self.LAYERS * width)
        self.c = nn.Parameter(torch.full((self.LAYERS,), math.log(math.e - 1.0)))  # softplus(c) = 1
        self.linear_out = zero_init(Pointwise(width, channels))

    def forward(self, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """h (B, channels, H', W') or (B * M, ...), z (B * M, z_channels, H, W) -> (B * M, channels, H', W')."""
        size = (h.shape[2], h.shape[3])
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
