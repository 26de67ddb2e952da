"""The denoisers that this package can sample, train or extend, by class name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, get_args

from diffusers import DiTTransformer2DModel, ModelMixin, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

from .backbone import Backbone
from .extended import ExtendedUNet2DModel
from .extended_condition import ExtendedUNet2DConditionModel
from .extended_dit import ExtendedDiTTransformer2DModel
from .extended_sd3 import ExtendedSD3Transformer2DModel
from .unet import SMDUNet2DModel

EXTENDED: dict[str, type[Backbone]] = {
    cls.__name__: cls
    for cls in (
        ExtendedUNet2DModel,
        ExtendedUNet2DConditionModel,
        ExtendedDiTTransformer2DModel,
        ExtendedSD3Transformer2DModel,
    )
}
"""Networks of diffusers with a mixture."""
EXTENSIONS: dict[str, Callable[..., Backbone]] = {
    "UNet2DModel": ExtendedUNet2DModel.from_unet,
    "UNet2DConditionModel": ExtendedUNet2DConditionModel.from_unet,
    "DiTTransformer2DModel": ExtendedDiTTransformer2DModel.from_transformer,
    "SD3Transformer2DModel": ExtendedSD3Transformer2DModel.from_transformer,
}
"""Class of a diffusers network -> function from its folder to the network with a new mixture."""
Denoiser: TypeAlias = (
    SMDUNet2DModel
    | ExtendedUNet2DModel
    | ExtendedUNet2DConditionModel
    | ExtendedDiTTransformer2DModel
    | ExtendedSD3Transformer2DModel
    | UNet2DModel
    | UNet2DConditionModel
    | DiTTransformer2DModel
    | SD3Transformer2DModel
)
DENOISERS: dict[str, type[ModelMixin]] = {cls.__name__: cls for cls in get_args(Denoiser)}
