"""FeatureNetwork: the small classifier for distances between sets of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn


class FeatureNetwork(ModelMixin, ConfigMixin):
    """A small residual classifier with a head for each of several image sets. Its features are the pooled last layer.

    Args:
        block_out_channels: channels of the stem, then of each level; a level halves the sides.
        classes: {name of an image set: its number of classes}.
    """

    @register_to_config
    def __init__(self, block_out_channels: tuple[int, ...] = (16, 32, 64, 128), classes: dict[str, int] | None = None) -> None:
        super().__init__()
        first, *rest = block_out_channels
        self.stem = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.stages = nn.Sequential(*(ClassifierLevel(a, b) for a, b in zip((first, *rest), rest)))
        self.norm = nn.BatchNorm2d(block_out_channels[-1])
        self.heads = nn.ModuleDict({name: nn.Linear(block_out_channels[-1], n) for name, n in (classes or {}).items()})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W) in [-1, 1] to features (N, D)."""
        h = self.stages(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        return F.relu(self.norm(h)).mean(dim=(2, 3))


class ClassifierLevel(nn.Module):
    """A strided convolution, then a residual block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.down = nn.Sequential(*pre_activated(in_channels, out_channels, stride=2))
        self.block = nn.Sequential(*pre_activated(out_channels, out_channels), *pre_activated(out_channels, out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(x)
        return h + self.block(h)


def pre_activated(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    """Return norm, ReLU and a 3x3 convolution."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return [nn.BatchNorm2d(in_channels), nn.ReLU(), convolution]
