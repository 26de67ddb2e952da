"""The denoiser as a training starts with it: untrained, or with the weights of ``init_from``, its noise fitted."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

from ..data.shards import Manifest
from ..errors import UserError, one_line
from ..models.backbone import Backbone
from ..models.denoiser import embedding_dimensions
from ..models.extended import class_of
from ..models.fit import fit_posterior_noise
from ..models.hub import network_folder
from ..models.known import EXTENDED, EXTENSIONS
from ..models.mixture import Mixture
from ..models.unet import SMDUNet2DModel
from ..schedulers.conversion import path_of
from ..schedulers.schedule import build_scheduler
from ..schema import check
from .checkpoint import checkpoints, load_weights
from .coarse_labels import class_names
from .fit_gaussian import LATENTS_PER_COMPONENT, fitting_latents
from .run import Run
from .settings import TrainConfig


def initial_model(run: Run) -> Backbone:
    """Make ``build_model``'s on the device, its noise fitted unless a checkpoint has it."""
    model = build_model(run.config, run.manifest)
    if model.mixture is not None and not model.mixture.noise.is_fitted and not checkpoints(run.checkpoints):
        fit_noise(model.mixture, run)
    return model.to(run.accelerator.device)


def build_model(config: TrainConfig, manifest: Manifest) -> Backbone:
    """Make the configured UNet for the latents and classes of the shards, untrained or with the weights of ``init_from``; a
    network of diffusers in ``init_from`` is extended to a mixture."""
    start = None if config.init_from is None else network_folder(config.init_from, "init_from")
    kind = None if start is None else class_of(start)
    if start is not None and kind in (*EXTENDED, *EXTENSIONS):
        return extended_model(config, manifest, start, kind)
    channels, height, width = manifest.latent_shape
    shape = config.model.of_unet()
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
    """Extend the network in a folder, of this class, which keeps its blocks, by a mixture of the sizes in ``config.model``."""
    shape = config.model
    known = inspect.signature(EXTENDED[kind] if kind in EXTENDED else EXTENDED[f"Extended{kind}"]).parameters
    embeds, path = "embedding_dimensions" in known, config.diffusion.path
    check(embeds or not config.image_conditional, "image_conditional", f"false for the {kind} of init_from", True)
    check("SD3" not in kind or path == "flow", "diffusion.path", f"flow, as the {kind} of init_from", path)
    if kind in EXTENDED:
        check(shape.z_channels > 0, "model.z_channels", f"more than 0 for the mixture {folder}", 0)
        model = EXTENDED[kind].from_pretrained(folder, use_safetensors=True)
        if config.image_conditional:
            found, given = embedding_dimensions(model), manifest.embedding_dimensions
            check(found == given, "init_from", f"a mixture for embeddings of {given} dimensions, as the shards'", found)
    elif shape.z_channels == 0 or shape.placement != "up":
        raise UserError(
            f"init_from: expected a mixture, model.z_channels > 0 and model.placement=up, to extend a diffusers {kind} to, "
            f"found {shape.z_channels} and {shape.placement}"
        )
    else:
        names = ("z_channels", "identifier_channels", "hypernetwork_width", "noise_rank", "tail_blocks")
        sizes = {name: getattr(shape, name) for name in names if name in known}
        sizes |= conditions(config, manifest) if embeds else {}
        modes, timesteps = noise_modes(config, manifest), noise_timesteps(config)
        try:
            model = EXTENSIONS[kind](folder, **sizes, noise_modes=modes, noise_timesteps=timesteps)
        except ValueError as error:
            raise UserError(f"init_from: {one_line(error)}") from error
    channels, classes = manifest.latent_shape[0], len(class_names(config, manifest.classes))
    check(model.config.in_channels == channels, "init_from", f"{channels} channels, as the latents", model.config.in_channels)
    if model.config.num_classes is not None:
        what = f"{classes + 1} class embeddings, {classes} classes and no label"
        check(model.config.num_classes == classes, "init_from", what, model.config.num_classes + 1)
    return model


def conditions(config: TrainConfig, manifest: Manifest) -> dict[str, int | None]:
    """Return what the model is conditioned on: the number of classes and the length of image embeddings, None for none."""
    classes = len(class_names(config, manifest.classes))
    dimensions = manifest.embedding_dimensions if config.image_conditional else None
    return {"num_classes": classes or None, "embedding_dimensions": dimensions}


def noise_modes(config: TrainConfig, manifest: Manifest) -> int:
    """Return the modes of the mixture's noise: fewer than configured where there are few images."""
    return max(1, min(config.model.noise_modes, manifest.count // LATENTS_PER_COMPONENT))


def noise_timesteps(config: TrainConfig) -> int:
    """Return the timesteps at which the mixture's noise is known: 0 to the last of the path."""
    return path_of(build_scheduler(config.diffusion)).last + 1


def fit_noise(mixture: Mixture, run: Run) -> None:
    """Fit the mixture's noise to the first latents of the stream, the same on every process."""
    latents, labels = fitting_latents(run.manifest, run.autoencoder, run.config.seed, run.config.mirror)
    if run.coarse is not None:
        labels = torch.cat((labels[:, None], run.coarse.to(labels.device)[labels]), dim=1)
    fit_posterior_noise(mixture.noise, latents, labels, run.process(), run.config.diffusion.predicts)
