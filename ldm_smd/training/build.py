"""Builds the initial denoiser of a run: random weights or those of ``init_from``, with fitted noise."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import torch

from ..data.shards import Manifest
from ..errors import UserError, one_line
from ..models.backbone import Backbone
from ..models.denoiser import embedding_dimensions
from ..models.extended import class_of
from ..models.fit import fit_posterior_noise
from ..models.hub import network_folder
from ..models.mixture import Mixture
from ..models.registry import EXTENDED, EXTENSIONS
from ..models.unet import SMDUNet2DModel
from ..schedulers.conversion import path_of
from ..schedulers.schedule import build_scheduler
from ..schema import check
from .checkpoint import checkpoints, load_weights
from .coarse_labels import class_names
from .fit_gaussian import FITTING_LATENTS, LATENTS_PER_COMPONENT, fitting_latents
from .run import Run
from .same_data import other_data
from .same_process import check_process
from .settings import TrainConfig

logger = logging.getLogger(__name__)


def initial_model(run: Run) -> Backbone:
    """Build the model on the device. Fits its noise, unless a checkpoint holds it already."""
    model, config = build_model(run.config, run.manifest), run.config
    if config.init_from is not None and run.accelerator.is_main_process and not checkpoints(run.checkpoints):
        difference = other_data(run, network_folder(config.init_from, "init_from"))
        if difference is not None:
            logger.warning("init_from: %s has %s", config.init_from, difference)
    if model.mixture is not None and not model.mixture.noise.is_fitted and not checkpoints(run.checkpoints):
        fit_noise(model.mixture, run)
    return model.to(run.accelerator.device)


def build_model(config: TrainConfig, manifest: Manifest) -> Backbone:
    """Build the configured UNet for the latents and classes of the shards, with random weights or those of ``init_from``. If
    ``init_from`` is a network of diffusers, extend it to a mixture instead."""
    start = None if config.init_from is None else network_folder(config.init_from, "init_from")
    kind = None if start is None else class_of(start)
    if start is not None:
        check_process(config.diffusion, start, "init_from")
    if start is not None and kind in (*EXTENDED, *EXTENSIONS):
        return extended_model(config, manifest, start, kind)
    channels, height, width = manifest.latent_shape
    shape = config.model.unet_arguments()
    shape["noise_modes"] = noise_modes(config, manifest)
    model = SMDUNet2DModel(
        sample_size=max(height, width),
        in_channels=channels,
        out_channels=channels,
        noise_timesteps=noise_timesteps(config),
        **conditions(config, manifest),
        **shape,
    )
    if start is not None:
        kept = None if model.mixture is None else model.mixture.noise
        load_weights(model, start, "init_from", new=(model.mixture, model.image_embedding), kept=kept)
    return model


def extended_model(config: TrainConfig, manifest: Manifest, folder: Path, kind: str) -> Backbone:
    """Extend the network in ``folder``, of class ``kind``, to a mixture with the sizes in ``config.model``."""
    shape = config.model
    channels, classes = manifest.latent_shape[0], len(class_names(config, manifest.classes))
    known = inspect.signature(EXTENDED[kind] if kind in EXTENDED else EXTENDED[f"Extended{kind}"]).parameters
    embeds, path = "embedding_dimensions" in known, config.diffusion.path
    check(embeds or not config.image_conditional, "image_conditional", f"false for the {kind} of init_from", True)
    check("SD3" not in kind or path == "flow", "diffusion.path", f"flow, as the {kind} of init_from", path)
    if kind in EXTENDED:
        check(shape.z_channels > 0, "model.z_channels", f"more than 0 for the mixture {folder}", 0)
        model = EXTENDED[kind].from_pretrained(folder, use_safetensors=True)
        if config.image_conditional:
            found, given = embedding_dimensions(model), manifest.embedding_dimensions
            check(found == given, "init_from", f"a mixture for embeddings of {given} dimensions, as in the shards", found)
    elif shape.z_channels == 0 or shape.placement != "up":
        raise UserError(
            f"init_from: expected model.z_channels > 0 and model.placement=up to extend a {kind} to a mixture, "
            f"found {shape.z_channels} and {shape.placement}"
        )
    else:
        names = ("z_channels", "identifier_channels", "hypernetwork_width", "noise_rank", "tail_blocks")
        sizes = {name: getattr(shape, name) for name in names if name in known}
        sizes |= conditions(config, manifest) if embeds else {}
        sizes |= {"classes": classes} if kind == "UNet2DModel" else {}
        modes, timesteps = noise_modes(config, manifest), noise_timesteps(config)
        try:
            model = EXTENSIONS[kind](folder, **sizes, noise_modes=modes, noise_timesteps=timesteps)
        except ValueError as error:
            raise UserError(f"init_from: {one_line(error)}") from error
    check(model.config.in_channels == channels, "init_from", f"{channels} channels, like the latents", model.config.in_channels)
    if model.config.num_classes is not None:
        what = f"{classes + 1} class embeddings, for {classes} classes and the null class"
        check(model.config.num_classes == classes, "init_from", what, model.config.num_classes + 1)
    return model


def conditions(config: TrainConfig, manifest: Manifest) -> dict[str, int | None]:
    """Return the number of classes and the dimension of image embeddings that the model is conditioned on; None for none."""
    classes = len(class_names(config, manifest.classes))
    dimensions = manifest.embedding_dimensions if config.image_conditional else None
    return {"num_classes": classes or None, "embedding_dimensions": dimensions}


def noise_modes(config: TrainConfig, manifest: Manifest) -> int:
    """Return the number of modes of the fitted noise, fewer than configured if there are few images."""
    return max(1, min(config.model.noise_modes, min(manifest.count, FITTING_LATENTS) // LATENTS_PER_COMPONENT))


def noise_timesteps(config: TrainConfig) -> int:
    """Return the number of timesteps of the fitted noise: 0 to the last of the path."""
    return path_of(build_scheduler(config.diffusion)).last + 1


def fit_noise(mixture: Mixture, run: Run) -> None:
    """Fit the mixture's noise to the first latents of the stream, which are the same on every process."""
    latents, labels = fitting_latents(run.manifest, run.autoencoder, run.config.seed, run.config.mirror)
    if run.coarse is not None:
        coarse = torch.where(labels[:, None] < 0, -1, run.coarse.to(labels.device)[labels])
        labels = torch.cat((labels[:, None], coarse), dim=1)
    fit_posterior_noise(mixture.noise, latents, labels, run.process(), run.config.diffusion.predicts)
