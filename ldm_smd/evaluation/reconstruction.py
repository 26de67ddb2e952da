"""Quality of an autoencoder's reconstructions."""

from __future__ import annotations

import torch

from ..autoencoder import FrozenAutoencoder


def reconstruct(autoencoder: FrozenAutoencoder, pixels: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Encode images, uint8 (N, 3, H, W), and decode the posterior mean; returns uint8 images of that shape, on the CPU."""
    parts = []
    for batch in pixels.split(batch_size):
        latents = autoencoder.normalise(autoencoder.encode_moments(batch)[:, 0])
        parts.append(to_uint8(autoencoder.decode(latents)).cpu())
    return torch.cat(parts)


def reconstruction_psnr(autoencoder: FrozenAutoencoder, pixels: torch.Tensor, batch_size: int = 64) -> dict[str, float]:
    """Measure the reconstruction of ``pixels``, uint8 (N, 3, H, W).

    psnr: mean over images of 10 log10(255^2 / MSE of the image), in dB, the usual definition. psnr_of_mean: PSNR of the MSE
    over all images, never larger.
    """
    errors = []
    for batch in pixels.split(batch_size):
        decoded = reconstruct(autoencoder, batch, batch_size)
        errors.append((decoded.double() - batch.double()).square().mean(dim=(1, 2, 3)))
    mse = torch.cat(errors).clamp_min(1e-3)
    return {
        "psnr": float((10 * torch.log10(255.0**2 / mse)).mean()),
        "psnr_of_mean": float(10 * torch.log10(255.0**2 / mse.mean())),
    }


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert images in [-1, 1] to uint8, rounded."""
    return ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
