"""Tiny versions of the backbones: each as a Gaussian model, and as the mixture made from it."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

from ldm_smd.models.extended import ExtendedUNet2DModel, plain_config
from ldm_smd.models.extended_condition import ExtendedUNet2DConditionModel
from ldm_smd.models.extended_dit import ExtendedDiTTransformer2DModel
from ldm_smd.models.extended_sd3 import ExtendedSD3Transformer2DModel
from ldm_smd.models.settings import PLACEMENTS
from ldm_smd.models.unet import SMDUNet2DModel
from tests.tiny import MIXTURE, SIZES, diffusers_condition, diffusers_dit, diffusers_sd3, diffusers_unet

NOISE = {"noise_rank": 5, "noise_modes": 2}
BACKBONES = (
    *(f"smd-{placement}" for placement in PLACEMENTS),
    "unet2d",
    "unet2d-late",
    "dit",
    "condition",
    "condition-late",
    "sd3",
)
"""Those with "late" are split into trunk and tail before the last up block."""


def gaussian(name, **changes):
    """Build the Gaussian model, with a last layer that is not zero."""
    torch.manual_seed(0)
    name = name.removesuffix("-late")
    if name == "unet2d":
        return diffusers_unet(**{"num_class_embeds": 4, **changes}).eval()
    if name == "dit":
        return diffusers_dit(**changes).eval()
    if name == "condition":
        return diffusers_condition(**changes).eval()
    if name == "sd3":
        return diffusers_sd3(**changes).eval()
    model = SMDUNet2DModel(8, 4, 4, num_classes=3, **{**SIZES, "z_channels": 0, **changes}).eval()
    torch.nn.init.normal_(model.conv_out.weight)
    return model


def mixture(name, **changes):
    """Build a mixture from the Gaussian model of ``gaussian(name)``. Its own parts have their initial weights."""
    plain = gaussian(name)
    late = {"tail_blocks": 1} if name.endswith("-late") else {}
    torch.manual_seed(1)
    if isinstance(plain, UNet2DModel):
        sizes = {"sample_size": 8, "in_channels": 4, "num_classes": 3, **MIXTURE, **NOISE, **late, **changes}
        model = ExtendedUNet2DModel(plain_config(plain), **sizes).eval()
        model.unet.load_state_dict(plain.state_dict())
        return model
    if isinstance(plain, DiTTransformer2DModel):
        sizes = {"sample_size": 8, "in_channels": 4, "num_classes": 3, "tail_blocks": 2, **MIXTURE, **NOISE, **changes}
        model = ExtendedDiTTransformer2DModel(plain_config(plain), **sizes).eval()
        model.transformer.load_state_dict(plain.state_dict())
        return model
    if isinstance(plain, UNet2DConditionModel):
        sizes = {"sample_size": 8, "in_channels": 4, "num_classes": 3, **MIXTURE, **NOISE, **late, **changes}
        model = ExtendedUNet2DConditionModel(plain_config(plain), **sizes).eval()
        model.unet.load_state_dict(plain.state_dict())
        return model
    if isinstance(plain, SD3Transformer2DModel):
        sizes = {"sample_size": 8, "in_channels": 4, "num_classes": 3, "tail_blocks": 2, **MIXTURE, **NOISE, **changes}
        model = ExtendedSD3Transformer2DModel(plain_config(plain), **sizes).eval()
        model.transformer.load_state_dict(plain.state_dict())
        return model
    placement = name.removeprefix("smd-")
    model = SMDUNet2DModel(8, 4, 4, num_classes=3, **{**SIZES, **NOISE, "placement": placement, **changes}).eval()
    added = model.load_state_dict(plain.state_dict(), strict=False)
    assert not added.unexpected_keys and all(key.startswith("mixture.") for key in added.missing_keys)
    return model


def perturbed(model):
    """Add noise to all weights, because some are initially zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def inputs(draws=1, side=(8, 8), batch=2):
    """Return x_t, t, labels and eta."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, *side, generator=generator)
    eta = torch.randn(batch * draws, 4, *side, generator=generator)
    return x, torch.tensor([900, 20])[:batch], torch.tensor([0, 2])[:batch], eta
