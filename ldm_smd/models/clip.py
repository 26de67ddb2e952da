"""OpenCLIP: embeds images and texts as vectors of unit length in the same space."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import UserError, one_line
from ..files import sha256
from .pretrained import Resize, state_sha256, weights_file


class ClipEncoder:
    """A frozen OpenCLIP model.

    Args:
        architecture: a name in OpenCLIP, such as ViT-B-32; or, without ``source``, a folder with open_clip_config.json and
            open_clip_model.safetensors, as OpenCLIP saves models for the hub.
        source: a .safetensors file, or the name of pretrained weights to download.
        key: the setting to name in error messages.

    Attributes:
        name: name of the architecture.
        sha256: hash of the weights.
        dimensions: D of the embeddings.
        quick_gelu: whether OpenCLIP was asked for the activation QuickGELU, as the pretrained weights need it.
        resize: preprocessing of images.
    """

    def __init__(self, architecture: str, source: str, device: torch.device, key: str) -> None:
        import open_clip

        folder, quick_gelu = Path(architecture), False
        if not source and (folder / "open_clip_config.json").is_file():
            self.name, architecture = f"OpenCLIP {folder.name}", f"local-dir:{folder}"
            # OpenCLIP prefers this file to any pickle in the folder.
            file = weights_file(key, str(folder / "open_clip_model.safetensors"), (), self.name)
        elif architecture in open_clip.list_models():
            self.name = f"OpenCLIP {architecture}"
            tags = open_clip.list_pretrained_tags_by_model(architecture)
            file = weights_file(key, source, tags, self.name)
            # Some published weights were trained with QuickGELU, which OpenCLIP leaves to the caller.
            quick_gelu = file is None and bool(open_clip.get_pretrained_cfg(architecture, source).get("quick_gelu"))
            quick_gelu = quick_gelu and not open_clip.get_model_config(architecture).get("quick_gelu")
            source = str(file or source)
        else:
            raise UserError(
                f"{key}: expected an architecture of OpenCLIP, such as ViT-B-32, or a folder with open_clip_config.json, found "
                f"{architecture!r}"
            )
        self.quick_gelu = quick_gelu
        try:
            self.model = open_clip.create_model(
                architecture, pretrained=source or None, device=device, force_quick_gelu=quick_gelu
            )
        except (OSError, RuntimeError) as error:
            raise UserError(f"{key}: expected weights of {self.name} that can be loaded, found {one_line(error)}") from error
        self.model.eval().requires_grad_(False)
        self.dimensions: int = open_clip.get_model_config(architecture)["embed_dim"]
        self.sha256 = sha256(file) if file else state_sha256(self.model)
        settings = open_clip.get_model_preprocess_cfg(self.model)
        self.resize = Resize(settings["size"], settings["mean"], settings["std"], device)
        self.device, self._tokenizer = device, open_clip.get_tokenizer(architecture)

    @classmethod
    def of(cls, spec: str, device: torch.device, key: str) -> ClipEncoder:
        """Load ``open_clip:ARCHITECTURE:SOURCE`` or ``open_clip:FOLDER``. Raises UserError for anything else."""
        library, _, rest = spec.partition(":")
        architecture, _, source = rest.partition(":")
        if library != "open_clip":
            raise UserError(f"{key}: expected open_clip:ARCHITECTURE:FILE.safetensors or open_clip:FOLDER, found {spec!r}")
        return cls(architecture, source, device, key)

    def identity(self) -> dict:
        """Describe the network for manifests. Networks with equal identities give equal embeddings."""
        found = {"network": self.name, "sha256": self.sha256, "resize": self.resize.name, "dimensions": self.dimensions}
        return found | ({"activation": "QuickGELU"} if self.quick_gelu else {})

    @torch.no_grad()
    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed images, (B, 3, H, W) in [0, 1] or uint8, as (B, D)."""
        pixels = pixels.to(self.device)
        pixels = pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels
        return self.model.encode_image(self.resize(pixels), normalize=True)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Embed texts as (B, D)."""
        return self.model.encode_text(self._tokenizer(texts).to(self.device), normalize=True)
