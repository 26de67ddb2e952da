"""Weights and preprocessing of pretrained networks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError


class Resize:
    """Resizes images in [0, 1] to ``size``, with antialiased bicubic filtering, then normalises by ``mean`` and ``std``."""

    def __init__(self, size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.size = size
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        self.name = f"antialiased bicubic to {size if isinstance(size, int) else size[0]} pixels"

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(pixels, size=self.size, mode="bicubic", antialias=True, align_corners=False)
        return (resized.clamp(0, 1) - self.mean) / self.std


def weights_file(key: str, source: str, known: Sequence[str], what: str) -> Path | None:
    """Return the safetensors file ``source``, or None for a name in ``known``. Raises UserError, naming ``key``, for others."""
    if source in known:
        return None
    file = Path(source)
    if not file.is_file() or file.suffix != ".safetensors":
        names = f" or a name of its weights ({', '.join(known)})" if known else ""
        raise UserError(f"{key}: expected a .safetensors file of {what}{names}, found {source!r}")
    return file


def state_sha256(model: nn.Module) -> str:
    """Hash weights that do not come from a local file."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
