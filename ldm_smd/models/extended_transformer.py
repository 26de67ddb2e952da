"""Functions shared by the extended transformers: patches, and the cut before the last blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import ModelMixin
from einops import rearrange

from .mixture import Cut

MOST_GROUPS = 32


def cut_before_blocks(transformer: ModelMixin, tail_blocks: int, channels: int, modulation_size: int) -> Cut:
    """Describe a cut before the last ``tail_blocks`` blocks. z acts before each of them, and the noise enters before the last.

    ``channels``: of the latents. Raises ValueError for too few blocks, or if the output channels differ from the input's.
    """
    blocks, width = transformer.transformer_blocks, transformer.inner_dim
    if not 1 <= tail_blocks < len(blocks):
        raise ValueError(f"tail_blocks: expected 1 to {len(blocks) - 1}, fewer than the network has, found {tail_blocks}")
    if transformer.out_channels != channels:
        raise ValueError(f"out_channels: expected {channels}, as in_channels, found {transformer.out_channels}")
    return Cut(
        feature_channels=width,
        feature_stride=1,
        embedding_dim=width,
        places={f"block{index}": width for index in range(len(blocks) - tail_blocks, len(blocks))},
        modulation_size=modulation_size,
        last_channels=width,
        out_channels=channels,
        norm_num_groups=math.gcd(MOST_GROUPS, width),
        patch_size=transformer.config.patch_size,
    )


def check_sides(sample: torch.Tensor, patch: int) -> None:
    """Raise ValueError unless the sides of latents (B, C, H, W) are multiples of the patch size."""
    if sample.shape[2] % patch or sample.shape[3] % patch:
        raise ValueError(f"sample: expected sides that are multiples of {patch}, found {tuple(sample.shape[2:])}")


def as_map(tokens: torch.Tensor, rows: int) -> torch.Tensor:
    """(B, h w, C) -> (B, C, h, w)"""
    return rearrange(tokens, "b (h w) c -> b c h w", h=rows)


def as_tokens(h: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h w, C)"""
    return rearrange(h, "b c h w -> b (h w) c")


def unpatched(tokens: torch.Tensor, rows: int, patch: int) -> torch.Tensor:
    """(B, h w, p p C) -> (B, C, h p, w p)"""
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch).contiguous()


def run_block(transformer: ModelMixin, index: int, *given: Any) -> Any:
    """Run a transformer block, with gradient checkpointing if it is enabled."""
    block = transformer.transformer_blocks[index]
    again = transformer.gradient_checkpointing and torch.is_grad_enabled()
    return transformer._gradient_checkpointing_func(block, *given) if again else block(*given)
