"""Small files: large weights in 8 bits, the rest in float16."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save

MIN_NUMBER = 4096
MAX_ERROR = 0.05


def save_float8(model: ModelMixin, folder: str | Path) -> None:
    """Save a model at half the size of float16, for ``from_pretrained``, which reads it in float32 like any other.

    Parameters of two or more dimensions and at least ``MIN_NUMBER`` numbers are stored as float8_e4m3fn, with 4 significant
    bits and about 2.5 % error. If the error of a parameter, relative to its norm, exceeds ``MAX_ERROR``, it stays in float16,
    as all others do: weights below 2^-6 have fewer bits.
    """
    model.save_config(folder)
    large = {name for name, value in model.named_parameters() if value.ndim > 1 and value.numel() >= MIN_NUMBER}
    stored = {name: rounded(value, name in large) for name, value in model.state_dict().items()}
    Path(folder, SAFETENSORS_WEIGHTS_NAME).write_bytes(save(stored, metadata={"format": "pt"}))


def rounded(value: torch.Tensor, large: bool) -> torch.Tensor:
    """Return ``value`` in float8_e4m3fn if it is ``large`` and the error is small, else in float16."""
    value = value.detach().contiguous()
    float8 = value.to(torch.float8_e4m3fn)
    small_error = large and (float8.float() - value.float()).norm() <= MAX_ERROR * value.float().norm()
    return float8 if small_error else value.half()
