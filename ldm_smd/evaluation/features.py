"""Features of pictures, for distances between sets of them: a small network the project ships, OpenCLIP or Inception.

A distance is named after the network it was measured in, and compares models under that network alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from ..device import pick_device
from ..errors import UserError
from ..progress import progress


class FeatureNetwork(ModelMixin, ConfigMixin):
    """A small residual classifier of several picture sets with one head each; its pooled last layer is the features.

    Args:
        block_out_channels: channels of the stem, then of each stage; a stage halves the sides.
        classes: {name of the picture set: its number of classes}.
    """

    @register_to_config
    def __init__(self, block_out_channels: tuple[int, ...] = (16, 32, 64, 128), classes: dict[str, int] | None = None) -> None:
        super().__init__()
        first, *rest = block_out_channels
        self.stem = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.stages = nn.Sequential(*(ClassifierStage(a, b) for a, b in zip((first, *rest), rest)))
        self.norm = nn.BatchNorm2d(block_out_channels[-1])
        self.heads = nn.ModuleDict({name: nn.Linear(block_out_channels[-1], n) for name, n in (classes or {}).items()})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> features (N, D)."""
        h = self.stages(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        return F.relu(self.norm(h)).mean(dim=(2, 3))


class ClassifierStage(nn.Module):
    """A strided convolution, then a pre-activation residual block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.BatchNorm2d(in_channels), nn.ReLU(), nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        )
        self.block = nn.Sequential(
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(x)
        return h + self.block(h)


@dataclass
class Extractor:
    """Pictures in, features out.

    Attributes:
        name: what a distance in these features is to be called by.
        network: pixels (N, 3, H, W) in [0, 1] -> features (N, D), on ``device``.
    """

    name: str
    network: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, batch_size: int = 128, description: str | None = None) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> float64 features (N, D), on the CPU."""
        bar = progress(len(pixels), 0, description or self.name, disable=description is None)
        parts = []
        for batch in pixels.split(batch_size):
            parts.append(self.network(batch.to(self.device).float() / 255.0).double().cpu())
            bar.update(len(batch))
        bar.close()
        return torch.cat(parts)


def load_extractor(weights: str, device: str = "auto") -> Extractor:
    """The feature network ``weights`` stands for.

    Args:
        weights: the folder of a FeatureNetwork; ``open_clip:ARCHITECTURE:FILE.safetensors``; or ``inception:FILE``, the FID
            network of torch-fidelity (package ``torch-fidelity``) with its weights file.
    """
    kind, _, rest = weights.partition(":")
    where = pick_device(device)
    if kind == "open_clip":
        architecture, _, file = rest.partition(":")
        return open_clip_extractor(architecture, Path(file), where)
    if kind == "inception":
        return inception_extractor(Path(rest), where)
    if not (Path(weights) / "config.json").is_file():
        raise UserError(f"features: expected a FeatureNetwork folder, open_clip:NAME:FILE or inception:FILE, found {weights}")
    model = FeatureNetwork.from_pretrained(weights, use_safetensors=True).eval().to(where)
    return Extractor(Path(weights).name, lambda pixels: model(2 * pixels - 1), where)


def open_clip_extractor(architecture: str, file: Path, device: torch.device) -> Extractor:
    """The image tower of an OpenCLIP model, features normalised to length 1, pictures resized as in its training."""
    import open_clip

    if not file.is_file() or file.suffix != ".safetensors":
        raise UserError(f"features: expected a .safetensors file of OpenCLIP {architecture}, found {str(file)!r}")
    model = open_clip.create_model(architecture, pretrained=str(file), device=device).eval()
    settings = open_clip.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(settings[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    size = settings["size"]

    def network(pixels: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return model.encode_image((resized - mean) / std, normalize=True)

    return Extractor(f"OpenCLIP {architecture}", network, device)


def inception_extractor(file: Path, device: torch.device) -> Extractor:
    """The Inception network of FID, 2,048 features, as torch-fidelity has it; it resizes by itself."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("features: expected the package torch-fidelity for inception:FILE, found none") from error
    if not file.is_file():
        raise UserError(f"features: expected the weights file of torch-fidelity's Inception, found none at {str(file)!r}")
    model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file)).to(device)
    return Extractor("Inception", lambda pixels: model((pixels * 255).round().to(torch.uint8))[0], device)
