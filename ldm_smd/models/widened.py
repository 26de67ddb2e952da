"""Copies of diffusers denoisers with additional input and output channels, or a null class."""

from __future__ import annotations

import logging

import torch
from accelerate import PartialState
from diffusers import ModelMixin, UNet2DModel

logger = logging.getLogger(__name__)


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
    return copied.to(network.device, network.dtype).train(network.training)


def without_variance(network: ModelMixin) -> ModelMixin:
    """Return a denoiser without the outputs of a learned variance: a copy, or the network itself if it has none."""
    return network if network.config.out_channels == network.config.in_channels else widened(network)


def padded(weight: torch.Tensor, more: int, dim: int) -> torch.Tensor:
    """Append zeros along a dimension."""
    shape = list(weight.shape)
    shape[dim] = more
    return torch.cat((weight, weight.new_zeros(shape)), dim=dim)


def with_null_class(unet: UNet2DModel, classes: int) -> UNet2DModel:
    """Copy a UNet that has an embedding for each of ``classes`` and none for the null class, and append one: the mean of the
    others. Other UNets are returned as they are."""
    if unet.config.class_embed_type is not None or not classes or unet.config.num_class_embeds != classes:
        return unet
    if PartialState().is_main_process:
        found = f"an embedding for each of the {classes} classes and none for the null class"
        logger.warning("the UNet2DModel has %s: added one, the mean of the others", found)
    weights = unet.state_dict()
    embeddings = weights["class_embedding.weight"]
    weights["class_embedding.weight"] = torch.cat((embeddings, embeddings.mean(dim=0, keepdim=True)))
    copied = UNet2DModel.from_config(unet.config, num_class_embeds=classes + 1)
    copied.load_state_dict(weights)
    return copied.to(unet.device, unet.dtype).train(unet.training)
