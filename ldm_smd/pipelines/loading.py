"""Loads pipelines from model folders and from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

from ..errors import UserError, one_line
from ..models.gaussian import LatentGaussians
from ..models.hub import HUB_ID
from ..models.moments import MomentHeads
from ..models.registry import EXTENDED
from ..models.unet import SMDUNet2DModel
from ..schedulers import GMSScheduler, TeleportScheduler
from .smd import SMDPipeline

for cls in (SMDUNet2DModel, *EXTENDED.values(), MomentHeads, LatentGaussians, GMSScheduler, TeleportScheduler):
    # diffusers refuses hub pipelines with components from libraries that it does not know.
    methods = ["save_pretrained", "from_pretrained"]
    ALL_IMPORTABLE_CLASSES[cls.__name__] = LOADABLE_CLASSES.setdefault(cls.__module__, {})[cls.__name__] = methods

NETWORKS = ("unet", "moments", "gaussian", "guide")
"""Components of a pipeline that are networks, except the autoencoder."""


def model_folder(source: str | Path) -> Path:
    """Return a local model folder: ``source`` itself, or the cached copy of a hub id, downloaded if needed."""
    folder = Path(source)
    if not folder.exists() and HUB_ID.fullmatch(str(source)):
        try:
            folder = Path(SMDPipeline.download(str(source), use_safetensors=True))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"model: expected a model folder (RUN/model) or a hub id, found {source}: {one_line(error)}"
            ) from error
    if not (folder / "model_index.json").is_file():
        raise UserError(f"model: expected a model folder (RUN/model of tools/train.py) or a hub id, found neither at {source}")
    return folder


def weight_files(folder: Path, parts: Sequence[str]) -> list[Path]:
    """List the weight files of ``parts`` of a model folder, skipping parts that do not exist."""
    return [path for part in parts for path in sorted((folder / part).glob("*.safetensors"))]


def load_pipeline(source: str | Path) -> SMDPipeline:
    """Load a model folder or a hub id. Like SMDPipeline.from_pretrained, but raises UserError for bad input."""
    folder = model_folder(source)
    try:
        pipeline = SMDPipeline.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: expected a readable model folder, found {folder}: {one_line(error)}") from error
    for part in NETWORKS:
        module = getattr(pipeline, part)
        missing = [] if module is None else [name for name, value in module.state_dict().items() if value.is_meta]
        if missing:
            raise UserError(f"model: expected weights for all of {folder}/{part}, found none for {missing[0]}")
    return pipeline
