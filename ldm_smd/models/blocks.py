"""The blocks that the UNet and the mixture identifier share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attention


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a skip; the second norm is modulated by the embedding (AdaGN):

        h = norm(h) * (1 + scale) + shift

    ``modulation`` in ``forward`` holds the scales and shifts of *all* blocks of the network, (B, total); this block's are
    at ``self.modulation_slice``. So one matrix product serves every block, where one each is the usual way.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.modulation_slice = slice(0, 0)
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = modulation[:, self.modulation_slice, None, None].float().chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1.0 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all places of a feature map, around a skip."""

    def __init__(self, channels: int, head_dim: int, groups: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.to_qkv(h).view(batch, height * width, 3, channels // self.head_dim, self.head_dim)
        h = self.to_out(attention(*qkv.unbind(2)).reshape(batch, height * width, channels))
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Halve the sides (rounded up) with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def upsample(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Nearest neighbour to the sides of ``like``, the skip connection it meets, so that any input size works.

    No convolution of its own: a residual block follows, and a convolution at the larger size would cost a sixth of the
    whole network's time.
    """
    return F.interpolate(x, size=like.shape[2:], mode="nearest")


def assign_modulation_slices(root: nn.Module) -> int:
    """Give every ResidualBlock under ``root`` its place in the shared modulation vector; returns the vector's length."""
    total = 0
    for block in root.modules():
        if isinstance(block, ResidualBlock):
            block.modulation_slice = slice(total, total + 2 * block.out_channels)
            total += 2 * block.out_channels
    return total


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: the branch that ends here starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
