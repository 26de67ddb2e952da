"""Latent diffusion with soft mixture denoising."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.extended import ExtendedUNet2DModel
    from .models.extended_condition import ExtendedUNet2DConditionModel
    from .models.extended_dit import ExtendedDiTTransformer2DModel
    from .models.extended_sd3 import ExtendedSD3Transformer2DModel
    from .models.unet import SMDUNet2DModel
    from .pipelines import SMDPipeline, load_pipeline
    from .schedulers import GMSScheduler, SMDScheduler, TeleportScheduler, make_scheduler

    __version__: str

__all__ = [
    "ExtendedDiTTransformer2DModel",
    "ExtendedSD3Transformer2DModel",
    "ExtendedUNet2DConditionModel",
    "ExtendedUNet2DModel",
    "GMSScheduler",
    "SMDPipeline",
    "SMDScheduler",
    "SMDUNet2DModel",
    "TeleportScheduler",
    "__version__",
    "load_pipeline",
    "make_scheduler",
]

_HOMES = {
    "ExtendedDiTTransformer2DModel": ".models.extended_dit",
    "ExtendedSD3Transformer2DModel": ".models.extended_sd3",
    "ExtendedUNet2DConditionModel": ".models.extended_condition",
    "ExtendedUNet2DModel": ".models.extended",
    "GMSScheduler": ".schedulers",
    "SMDPipeline": ".pipelines",
    "SMDScheduler": ".schedulers",
    "SMDUNet2DModel": ".models.unet",
    "TeleportScheduler": ".schedulers",
    "load_pipeline": ".pipelines",
    "make_scheduler": ".schedulers",
}
"""Modules of the classes and functions, imported at first use: torch and diffusers take seconds, which --help must not."""


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: object = version("ldm_smd")
        except PackageNotFoundError:
            value = "0+source"  # a tree that is not installed
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
