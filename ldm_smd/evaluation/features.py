"""Feature networks for distances between sets of images: the shipped classifier, OpenCLIP, DINOv2 or Inception.

Only distances in the features of the same network, with the same resizing, can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..device import pick_device
from ..errors import UserError, one_line
from ..files import sha256
from ..models.clip import ClipEncoder
from ..models.feature_network import FeatureNetwork
from ..models.pretrained import Resize, state_sha256, weights_file
from ..progress import progress

DINOV2_SIDE = 224


@dataclass
class Extractor:
    """A network that turns images into features.

    Attributes:
        name: name of the network in results.
        network: pixels (N, 3, H, W) in [0, 1] -> features (N, D), on ``device``.
        sha256: hash of the weights.
        resize: how images are resized for the network.
        unit_length: whether the features are image embeddings of unit length, for CMMD.
    """

    name: str
    network: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    sha256: str
    resize: str
    unit_length: bool = False

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, batch_size: int = 128, description: str | None = None) -> torch.Tensor:
        """Map uint8 (N, 3, H, W) to float64 features (N, D), on the CPU."""
        parts = []
        with progress(len(pixels), 0, description or self.name, disable=description is None) as bar:
            for batch in pixels.split(batch_size):
                parts.append(self.network(batch.to(self.device).float() / 255.0).cpu().double())
                bar.update(len(batch))
        return torch.cat(parts)


def load_extractor(weights: str, device: str = "auto") -> Extractor:
    """Load a feature network. Raises UserError if it is not available.

    Args:
        weights: the folder of a FeatureNetwork; ``open_clip:ARCHITECTURE:FILE.safetensors``, an image tower of OpenCLIP;
            ``dinov2:ARCHITECTURE:FILE.safetensors`` with an architecture of timm, such as vit_large_patch14_dinov2; or
            ``inception:FILE``, the FID network of the package torch-fidelity. Names of pretrained weights instead of files
            (``open_clip:ViT-L-14-336:openai``, ``dinov2:vit_large_patch14_dinov2:lvd142m``) are downloaded. ``#SHA256`` at
            the end checks the hash of the weights.
    """
    weights, _, wanted = weights.partition("#")
    family, _, rest = weights.partition(":")
    architecture, _, source = rest.partition(":")
    target = pick_device(device)
    if family == "open_clip":
        clip = ClipEncoder(architecture, source, target, key="features")
        # The activation has no weights, so the hash does not show it. Cached features depend on ``resize`` too.
        resize = clip.resize.name + (", QuickGELU" if clip.quick_gelu else "")
        extractor = Extractor(clip.name, clip.images, target, clip.sha256, resize, unit_length=True)
    elif family == "dinov2":
        extractor = dinov2_extractor(architecture, source, target)
    elif family == "inception":
        extractor = inception_extractor(Path(rest), target)
    elif (Path(weights) / "config.json").is_file():
        model = FeatureNetwork.from_pretrained(weights, use_safetensors=True).eval().to(target)
        name, digest = Path(weights).name, sha256(Path(weights) / SAFETENSORS_WEIGHTS_NAME)
        extractor = Extractor(name, lambda pixels: model(2 * pixels - 1), target, digest, "none")
    else:
        raise UserError(
            "features: expected a FeatureNetwork folder (the repository has checkpoints/classifier), open_clip:NAME:FILE, "
            f"dinov2:NAME:FILE or inception:FILE, found none at {weights!r}"
        )
    if not extractor.sha256.startswith(wanted.lower()):
        raise UserError(f"features: expected weights with the SHA-256 {wanted}, found {extractor.sha256} for {weights}")
    return extractor


def dinov2_extractor(architecture: str, source: str, device: torch.device) -> Extractor:
    """Load a DINOv2 of timm. Features are its class token, at 224 pixels as in EDM2's Frechet distance."""
    import timm

    known = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    file = weights_file("features", source, known, f"DINOv2 {architecture}")
    # As pretrained weights, timm resamples the position embeddings of a file to this side.
    overlay = {"file": str(file)} if file else None
    name = architecture if file else f"{architecture}.{source}"
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=DINOV2_SIDE)
    except RuntimeError as error:
        raise UserError(f"features: expected weights of {architecture}, found {source}: {one_line(error)}") from error
    model.eval().to(device)
    trained_on = cast(dict, model.pretrained_cfg)
    shrink = Resize(DINOV2_SIDE, trained_on["mean"], trained_on["std"], device)
    digest = sha256(file) if file else state_sha256(model)
    return Extractor(f"DINOv2 {architecture}", lambda pixels: model(shrink(pixels)), device, digest, shrink.name)


def inception_extractor(file: Path, device: torch.device) -> Extractor:
    """Load the Inception network of FID, with 2,048 features, from torch-fidelity. It resizes images itself."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("features: expected the package torch-fidelity for inception:FILE, found none") from error
    if not file.is_file():
        raise UserError(f"features: expected the weights file of torch-fidelity's Inception, found none at {str(file)!r}")
    try:
        torch.load(file, map_location="cpu", weights_only=True)  # torch-fidelity would run code in the file
    except Exception as error:
        raise UserError(
            f"features: expected the weights file of torch-fidelity's Inception, found {file}: {one_line(error)}"
        ) from error
    model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file)).to(device)
    resize = "bilinear to 299 pixels, as TensorFlow 1"
    return Extractor("Inception", lambda pixels: model((pixels * 255).round().byte())[0], device, sha256(file), resize)
