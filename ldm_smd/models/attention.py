"""One attention function: xformers where its kernels really run, else torch's scaled dot-product attention."""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F

from .settings import ATTENTION_BACKENDS

logger = logging.getLogger(__name__)

_backend = "auto"


def set_attention_backend(name: str) -> None:
    """Choose for the whole process. "auto": xformers on GPUs where it runs, else sdpa. "xformers": the same, with a warning
    where it does not run. "sdpa": always torch."""
    global _backend
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTION_BACKENDS)}, found {name!r}")
    _backend = name
    xformers_runs.cache_clear()  # to warn again where xformers does not run


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for tensors (B, length, heads, d); returns the same shape.

    The layout is xformers' (B, M, H, K); torch's function wants (B, heads, length, d), so that branch transposes.
    """
    device = query.device.type
    wanted = _backend == "xformers" or (_backend == "auto" and device == "cuda")
    if wanted and xformers_runs(device, query.dtype, query.shape[-1]):
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


@cache
def xformers_runs(device: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether xformers' operator works here, by running it once, forward and backward.

    Importing is not enough: a wheel built for another torch imports with a warning and has no operator, and on CPUs there
    is none at all (xformers 0.0.35 has kernels for torch 2.10 with CUDA 12.8).
    """
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 4, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            memory_efficient_attention(probe, probe, probe).sum().backward()
    except (ImportError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        if _backend == "xformers":
            logger.warning("attention: xformers does not run here (%s); using torch's own", type(error).__name__)
        return False
    return True
