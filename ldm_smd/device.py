"""What "auto" means: the device and the precision of this machine."""

from __future__ import annotations

import os

import torch

from .errors import UserError


def pick_device(name: str) -> torch.device:
    """The device called ``name``; for "auto" the GPU where there is one, of several processes on a node each its own."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error


def pick_precision(name: str) -> str:
    """accelerate's name for a ``precision`` setting. CPUs without bf16 units run bf16 10-20 times slower than float32."""
    if name != "auto":
        return name
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
