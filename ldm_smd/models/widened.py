"""Copies of diffusers denoisers with additional input and output channels."""

from __future__ import annotations

import torch
from diffusers import ModelMixin


def widened(network: ModelMixin, inputs: int = 0, outputs: int = 0) -> ModelMixin:
    """Copy a denoiser of C latent channels, with C + ``inputs`` input and C + ``outputs`` output channels.

    Existing output channels beyond the first C (a variance) are dropped. New weights are zero, so the first C outputs do not
    change.
    """
    channels = network.config.in_channels
    said = network.config.out_channels or channels
    copied = type(network).from_config(network.config, in_channels=channels + inputs, out_channels=channels + outputs)
    weights = network.state_dict()
    first = "conv_in" if hasattr(network, "conv_in") else "pos_embed.proj"
    last = next(name for name in ("conv_out", "proj_out_2", "proj_out") if hasattr(network, name))
    weights[f"{first}.weight"] = padded(weights[f"{first}.weight"], inputs, dim=1)
    for name in (f"{last}.weight", f"{last}.bias"):
        rows = weights[name].unflatten(0, (-1, said))  # one row per position in a patch
        weights[name] = padded(rows[:, :channels], outputs, dim=1).flatten(0, 1)
    copied.load_state_dict(weights)
    return copied.to(network.device, network.dtype)


def padded(weight: torch.Tensor, more: int, dim: int) -> torch.Tensor:
    """Append zeros along a dimension."""
    shape = list(weight.shape)
    shape[dim] = more
    return torch.cat((weight, weight.new_zeros(shape)), dim=dim)
