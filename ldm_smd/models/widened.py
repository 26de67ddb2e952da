"""A Gaussian denoiser of diffusers with other numbers of input and output channels."""

from __future__ import annotations

import torch
from diffusers import ModelMixin


def widened(network: ModelMixin, inputs: int = 0, outputs: int = 0) -> ModelMixin:
    """Copy a denoiser of C latent channels, with so many more input channels, and C + ``outputs`` output channels: those beyond
    the C that it has, a variance, are dropped. New weights are zero, so that the first C outputs are what they were."""
    channels = network.config.in_channels
    said = network.config.out_channels or channels
    copied = type(network).from_config(network.config, in_channels=channels + inputs, out_channels=channels + outputs)
    weights = network.state_dict()
    first = "conv_in" if hasattr(network, "conv_in") else "pos_embed.proj"
    last = next(name for name in ("conv_out", "proj_out_2", "proj_out") if hasattr(network, name))
    weights[f"{first}.weight"] = padded(weights[f"{first}.weight"], inputs, dim=1)
    for name in (f"{last}.weight", f"{last}.bias"):
        rows = weights[name].unflatten(0, (-1, said))  # of each position in a patch
        weights[name] = padded(rows[:, :channels], outputs, dim=1).flatten(0, 1)
    copied.load_state_dict(weights)
    return copied.to(network.device, network.dtype)


def padded(weight: torch.Tensor, more: int, dim: int) -> torch.Tensor:
    """Append zeros along a dimension."""
    shape = list(weight.shape)
    shape[dim] = more
    return torch.cat((weight, weight.new_zeros(shape)), dim=dim)
