"""Loads pipelines from model folders and from the hub: those of this package, and those of diffusers whose parts fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import snapshot_download

from ..autoencoder import Autoencoder, FrozenAutoencoder
from ..errors import UserError, one_line
from ..models.extended import class_of
from ..models.extended_condition import check_conditions
from ..models.gaussian import LatentGaussians
from ..models.hub import FILES, HUB_ID, SCHEDULER, SHARDS
from ..models.moments import MomentHeads
from ..models.registry import DENOISERS, EXTENDED
from ..models.unet import SMDUNet2DModel
from ..schedulers import CUSTOM
from ..schedulers.support import without_learned_variance
from .smd import SMDPipeline

for cls in (SMDUNet2DModel, *EXTENDED.values(), MomentHeads, LatentGaussians, *CUSTOM):
    # diffusers refuses hub pipelines with components from libraries that it does not know. It looks up the base class in the
    # module of the component, and lets any class of that base replace it in from_pretrained.
    base = SchedulerMixin if issubclass(cls, SchedulerMixin) else ModelMixin
    setattr(sys.modules[cls.__module__], base.__name__, base)
    LOADABLE_CLASSES.setdefault(cls.__module__, {})[base.__name__] = ["save_pretrained", "from_pretrained"]
# DiffusionPipeline.from_pretrained looks up the class of a pipeline in diffusers alone.
setattr(diffusers, SMDPipeline.__name__, SMDPipeline)

INDEX = "model_index.json"
DENOISER_PARTS = ("unet", "transformer")
NETWORKS = (*DENOISER_PARTS, "moments", "gaussian", "guide")
"""Parts of a model folder that are networks, except the autoencoder; one of diffusers may have a transformer, not a unet."""
AUTOENCODERS = [cls.__name__ for cls in get_args(Autoencoder)]


def model_folder(source: str | Path) -> Path:
    """Return a local model folder: ``source`` itself, or the cached copy of a hub id, downloaded if needed."""
    folder = Path(source)
    if not folder.exists() and HUB_ID.fullmatch(str(source)):
        try:
            folder = download(str(source))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"model: expected a model folder (RUN/model) or a hub id, found no folder {source}, and on the hub: "
                f"{one_line(error)}"
            ) from error
    if not (folder / INDEX).is_file() and not any((folder / part / FILES[0]).is_file() for part in DENOISER_PARTS):
        raise UserError(
            f"model: expected a model folder (RUN/model of tools/train.py), a pipeline of diffusers or a hub id, "
            f"found none of them at {source}"
        )
    return folder


def download(source: str) -> Path:
    """Download a pipeline from the hub; of one of diffusers, only the parts that are used."""
    folder = Path(snapshot_download(source, allow_patterns=[INDEX]))
    if is_own(index_of(folder)):
        return Path(SMDPipeline.download(source, use_safetensors=True))
    parts = [f"{part}/{name}" for part in (*DENOISER_PARTS, "vae") for name in (*FILES, SHARDS)]
    return Path(snapshot_download(source, allow_patterns=[INDEX, SCHEDULER, *parts]))


def weight_files(folder: Path, parts: Sequence[str]) -> list[Path]:
    """List the weight files of ``parts`` of a model folder, skipping parts that do not exist."""
    return [path for part in parts for path in sorted((folder / part).glob("*.safetensors"))]


def load_pipeline(source: str | Path, dtype: torch.dtype = torch.float32) -> SMDPipeline:
    """Load a model folder or a hub id: of a pipeline of this package, or of one of diffusers (``DiTPipeline``, for instance)
    with a denoiser, an autoencoder and a scheduler that SMDPipeline takes.

    Args:
        dtype: precision of the networks.

    Raises UserError for bad input.
    """
    folder = model_folder(source)
    try:
        own = is_own(index_of(folder))
        options: dict[str, Any] = {"use_safetensors": True, "dtype": dtype}
        pipeline = SMDPipeline.from_pretrained(folder, **options) if own else pipeline_of_parts(folder).to(dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: expected a readable model folder, found {folder}: {one_line(error)}") from error
    for part in NETWORKS:
        module = getattr(pipeline, part, None)
        missing = [] if module is None else [name for name, value in module.state_dict().items() if value.is_meta]
        if missing:
            raise UserError(f"model: expected weights for all of {folder}/{part}, found none for {missing[0]}")
    return pipeline


def index_of(folder: Path) -> dict[str, Any]:
    """Return the content of model_index.json, {} without one."""
    return json_of(folder / INDEX) or {}


def json_of(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def is_own(index: dict[str, Any]) -> bool:
    """Return whether the pipeline of this model_index.json is an SMDPipeline, or of a class derived from it."""
    return index.get("_class_name") == SMDPipeline.__name__ or "gaussian" in index


def pipeline_of_parts(folder: Path) -> SMDPipeline:
    """Make an SMDPipeline of the denoiser, the autoencoder and the scheduler in the folder of another pipeline.

    Raises UserError, with the classes that were found, if they do not fit.
    """
    network = next((folder / part for part in DENOISER_PARTS if class_of(folder / part)), folder / DENOISER_PARTS[0])
    configured = json_of(folder / SCHEDULER) or {}
    kinds = (class_of(network), class_of(folder / "vae"), configured.get("_class_name"))
    scheduler_class: Any = getattr(diffusers, str(kinds[2]), object)
    if kinds[0] not in DENOISERS or kinds[1] not in AUTOENCODERS or not issubclass(scheduler_class, SchedulerMixin):
        raise UserError(
            f"model: expected a pipeline of a denoiser ({', '.join(DENOISERS)}), an autoencoder ({', '.join(AUTOENCODERS)}) "
            f"and a scheduler, found {', '.join(str(kind or 'none') for kind in kinds)} in {folder}"
        )
    unet = DENOISERS[kinds[0]].from_pretrained(network, use_safetensors=True)
    if isinstance(unet, UNet2DConditionModel):
        check_conditions(unet)
    if isinstance(unet, UNet2DModel) and unet.config.class_embed_type is not None:
        found = f"class_embed_type={unet.config.class_embed_type} in {network}"
        raise UserError(f"model: expected a UNet2DModel that learns an embedding of each class, found {found}")
    autoencoder = FrozenAutoencoder.from_pretrained(folder / "vae")
    if unet.config.in_channels != autoencoder.latent_channels:
        found = f"{unet.config.in_channels} in {folder}"
        raise UserError(
            f"model: expected a denoiser of {autoencoder.latent_channels} channels, like the latents, found {found}"
        )
    scheduler = scheduler_class.from_config(without_learned_variance(configured))
    return SMDPipeline(unet, autoencoder.model, scheduler, index_of(folder).get("id2label"))
