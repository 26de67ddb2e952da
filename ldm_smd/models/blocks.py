"""Building blocks of the UNet and the mixture."""

from __future__ import annotations

from typing import TypeVar

import einops
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .attention import attention

Layer = TypeVar("Layer", bound=nn.Module)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with a residual connection. The embedding modulates the second norm (AdaGN):

        h = norm(h) * (1 + scale) + shift

    ``modulation`` in ``forward`` holds the scales and shifts of many blocks, (B, total); those of this block are at
    ``self.modulation_slice``. So one matrix product computes them for all blocks.

    With ``skip_channels``, the block also reads a feature map of the encoder path. It has its own norm and convolutions, whose
    output is added. In contrast to a convolution of the concatenation, the M draws of an image share the work on ``skip``.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float = 0.0, skip_channels: int = 0) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.modulation_slice = slice(0, 0)
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        if skip_channels:
            self.norm_skip = nn.GroupNorm(groups, skip_channels, eps=1e-5)
            self.conv_skip = nn.Conv2d(skip_channels, out_channels, 3, padding=1, bias=False)
            self.shortcut_skip = nn.Conv2d(skip_channels, out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor, modulation: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """x (B * M, in, H, W), modulation (B * M, total), skip (B, skip_channels, H, W) -> (B * M, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        shortcut = self.shortcut(x)
        if skip is not None:
            h = add_shared(h, self.conv_skip(F.silu(self.norm_skip(skip))))
            shortcut = add_shared(shortcut, self.shortcut_skip(skip))
        scale, shift = modulation[:, self.modulation_slice, None, None].float().chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1.0 + scale).to(h.dtype)  # half precision for half-precision weights
        return shortcut + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a residual connection."""

    def __init__(self, channels: int, head_dim: int, groups: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        query, key, value = rearrange(self.to_qkv(h), "b n (qkv heads d) -> qkv b n heads d", qkv=3, d=self.head_dim)
        h = self.to_out(rearrange(attention(query, key, value), "b n heads d -> b n (heads d)"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Pointwise(nn.Linear):
    """A 1x1 convolution as a matrix product; twice as fast for small channels-last feature maps on CPUs."""

    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """(B, in, H, W) -> (B, out, H, W), channels last. With ``onto`` (B, out, H, W): its sum with the convolution, without
        bias, in one pass over memory."""
        if onto is None:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        onto, rows = (y.permute(0, 2, 3, 1) for y in (onto, x))
        return torch.addmm(onto.flatten(0, 2), rows.flatten(0, 2), self.weight.T).view(*onto.shape).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve the sides, rounded up, with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def repeat(x: torch.Tensor, draws: int) -> torch.Tensor:
    """(B, ...) -> (B * draws, ...), the copies of an image in consecutive rows."""
    if draws == 1:
        return x
    if x.ndim == 4:  # in this order, so that the result is channels-last in memory
        return rearrange(einops.repeat(x, "b c h w -> (b m) h w c", m=draws), "b h w c -> b c h w")
    return einops.repeat(x, "b ... -> (b m) ...", m=draws)


def add_shared(x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Return x (B * M, ...) + shared (B, ...), the M rows of an image consecutive in x."""
    if len(x) == len(shared):
        return x + shared
    by_image = rearrange(x, "(b m) ... -> b m ...", b=len(shared))
    return rearrange(by_image + shared.unsqueeze(1), "b m ... -> (b m) ...")


def assign_modulation_slices(root: nn.Module) -> int:
    """Give every ResidualBlock under ``root`` its slice of the shared modulation vector; returns the vector's length."""
    total = 0
    for block in root.modules():
        if isinstance(block, ResidualBlock):
            block.modulation_slice = slice(total, total + 2 * block.out_channels)
            total += 2 * block.out_channels
    return total


def zero_init(module: Layer) -> Layer:
    """Set all parameters to zero, so that a branch that ends with this module has no effect at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
