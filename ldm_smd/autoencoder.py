"""FrozenAutoencoder: a common interface to AutoencoderKL, AutoencoderTiny and AutoencoderDC of diffusers.

It encodes uint8 images and decodes to floats in [-1, 1]. Latents are normalised with the constants of the model. Shards store
the moments of the encoder, which are normalised when they are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias, get_args

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, AutoModel, ModelMixin
from torch import nn

from .errors import UserError, one_line
from .models.denoiser import uncompiled
from .models.hub import AUTOENCODER_PARTS, network_folder

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny | AutoencoderDC
INPUT_RANGE = (-1.0, 1.0)
"""All three classes take images in [-1, 1] (AutoencoderTiny rescales them itself)."""


class FrozenAutoencoder(nn.Module):
    """Encodes and decodes with a diffusers autoencoder, without gradients, and without changing it.

    Args:
        model: an AutoencoderKL, AutoencoderTiny or AutoencoderDC.
        name: folder or hub id, for manifests and messages.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, model: ModelMixin, name: str = "") -> None:
        super().__init__()
        if not isinstance(uncompiled(model), Autoencoder):
            allowed = ", ".join(cls.__name__ for cls in get_args(Autoencoder))
            raise UserError(f"autoencoder: expected one of {allowed}, found {type(uncompiled(model)).__name__}")
        self.model = model
        self.name = name
        shift, scale = latent_affine(model.config)
        self.register_buffer("shift", shift.to(self.device), persistent=False)
        self.register_buffer("scale", scale.to(self.device), persistent=False)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> FrozenAutoencoder:
        """Load from a local folder (diffusers layout, safetensors) or a hub id such as "stabilityai/sd-vae-ft-mse": of the
        autoencoder, or of a pipeline with one in ``vae/``. Raises UserError for others."""
        folder = network_folder(source, "autoencoder", AUTOENCODER_PARTS, revision)
        if folder.exists() and not (folder / "config.json").is_file():
            raise UserError(
                f"autoencoder: expected the folder of an autoencoder or of a pipeline, found neither config.json nor "
                f"vae/config.json in {source}"
            )
        try:
            model = AutoModel.from_pretrained(str(folder), use_safetensors=True)
        except (OSError, ValueError) as error:
            found = f"{str(source)!r}: {one_line(error)}"
            raise UserError(f"autoencoder: expected a local model folder or a hub id, found {found}") from error
        return cls(model.eval().requires_grad_(False), str(source).rstrip("/"))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Return the device that the model runs on, even while it is offloaded."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.model.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in devices if device is not None), self.model.device))

    @property
    def latent_channels(self) -> int:
        return self.model.config.latent_channels

    @property
    def factor(self) -> int:
        return spatial_factor(self.model)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within the context, put the model in evaluation mode, and in float32 if it overflows in float16.

        ``force_upcast`` marks weights that overflow in float16 (the SDXL autoencoder); bfloat16 has the range of float32. An
        outer context converts the weights only once for several calls.
        """
        training, dtype = self.model.training, self.dtype
        upcast = dtype == torch.float16 and self.model.config.get("force_upcast", False)
        try:
            if training:
                self.model.eval()
            if upcast:
                self.model.to(torch.float32)
            yield
        finally:
            if upcast:
                self.model.to(dtype)
            if training:
                self.model.train()

    @torch.no_grad()
    def encode_moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 images (B, 3, H, W) to float32 moments (B, 2, C, h, w), mean and log-variance; (B, 1, C, h, w) from a
        deterministic autoencoder."""
        low, high = INPUT_RANGE
        # Autocast would use half precision even if the weights must stay in float32.
        with self.working(), torch.autocast(self.device.type, enabled=False):
            encoded = self.model.encode(pixels.to(self.device, self.dtype) / 255.0 * (high - low) + low)
        kind = type(uncompiled(self.model))
        if issubclass(kind, AutoencoderKL):
            return torch.stack((encoded.latent_dist.mean, encoded.latent_dist.logvar), dim=1).float()
        return (encoded.latents if issubclass(kind, AutoencoderTiny) else encoded.latent).unsqueeze(1).float()

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Convert encoder units to the denoiser's: (z - shift) * scale."""
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalised latents (B, C, h, w) to float32 images (B, 3, H, W), clamped to [-1, 1]."""
        z = latents.to(self.device, torch.float32) / self.scale + self.shift
        with self.working(), torch.autocast(self.device.type, enabled=False):
            x = self.model.decode(z.to(self.dtype)).sample
        return x.float().clamp(*INPUT_RANGE)

    def identity(self) -> dict:
        """Describe the model for manifests. Autoencoders with equal identities give equal latents."""
        return {
            "class": type(uncompiled(self.model)).__name__,
            "encoder_sha256": encoder_sha256(uncompiled(self.model)),
            "latent_channels": self.latent_channels,
            "input_range": list(INPUT_RANGE),
            "shift": self.shift.flatten().tolist(),
            "scale": self.scale.flatten().tolist(),
        }


def spatial_factor(model: ModelMixin) -> int:
    """Return the downsampling factor, the number of pixels per latent position along each side."""
    model = uncompiled(model)
    if isinstance(model, AutoencoderKL):
        return 2 ** (len(model.config.block_out_channels) - 1)
    if isinstance(model, AutoencoderTiny):  # its ``spatial_scale_factor`` is right for four levels only
        return model.config.upsampling_scaling_factor ** (len(model.config.decoder_block_out_channels) - 1)
    return model.spatial_compression_ratio


def sample_latents(
    moments: torch.Tensor, generator: torch.Generator | None = None, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw latents (B, C, h, w) from moments (B, 2 or 1, C, h, w): mean + exp(logvar / 2) * noise, in float32. ``noise``
    is drawn by default."""
    mean = moments[:, 0].float()
    if moments.shape[1] == 1:
        return mean
    if noise is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return mean + torch.exp(0.5 * moments[:, 1].float()) * noise


def latent_affine(config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (shift, scale), each (1, C or 1, 1, 1), from the config of a diffusers autoencoder.

    diffusers has two conventions: (z - shift_factor) * scaling_factor, and with per-channel constants
    (z - latents_mean) * scaling_factor / latents_std.
    """
    factor = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shift, scale = torch.tensor(mean), factor / torch.tensor(std)
    else:
        shift, scale = torch.tensor([config.get("shift_factor") or 0.0]), torch.tensor([factor])
    return shift.float().view(1, -1, 1, 1), scale.float().view(1, -1, 1, 1)


def encoder_sha256(model: nn.Module) -> str:
    """Hash the parameters and buffers that latents depend on: all except those of the decoder.

    The hash is independent of the file format, and latents stay valid if only the decoder is trained further.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
