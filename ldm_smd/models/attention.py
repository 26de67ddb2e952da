"""Attention with xformers if its kernels work here, otherwise with torch's scaled dot-product attention."""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F

from .settings import ATTENTION_BACKENDS

logger = logging.getLogger(__name__)

_backend = "auto"


def set_attention_backend(name: str) -> None:
    """Choose the backend for the whole process.

    "auto": xformers on GPUs if it works, otherwise torch. "xformers": the same, with a warning if it does not work. "sdpa":
    torch.
    """
    global _backend
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTION_BACKENDS)}, found {name!r}")
    _backend = name
    xformers_runs.cache_clear()  # to warn again if xformers does not work


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for tensors (B, length, heads, d); returns the same shape.

    This is the layout of xformers. torch's function takes (B, heads, length, d), so that branch transposes.
    """
    device = query.device.type
    wanted = _backend == "xformers" or (_backend == "auto" and device == "cuda")
    if wanted and chosen_at_compilation(device, query.dtype, query.shape[-1]):
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


@torch.compiler.assume_constant_result
def chosen_at_compilation(device: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Return ``xformers_runs``, which torch.compile would otherwise trace, with a break of the graph at every attention."""
    return xformers_runs(device, dtype, head_dim)


@cache
def xformers_runs(device: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether xformers' operator works here, by running it once, forward and backward.

    A successful import is not enough: a wheel built for another torch version imports with a warning but has no operator, and
    there is none for CPUs (xformers 0.0.35 has kernels for torch 2.10 with CUDA 12.8).
    """
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 4, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            memory_efficient_attention(probe, probe, probe).sum().backward()
    except (ImportError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        if _backend == "xformers":
            logger.warning("attention: xformers does not work here (%s); using torch", type(error).__name__)
        return False
    return True
