"""The teacher of distillation and regression, and the timesteps they train at."""

from __future__ import annotations

import torch
from diffusers import ModelMixin, UNet2DModel

from ..data.stream import LatentBatch
from ..diffusion.process import GaussianPath
from ..errors import UserError
from ..models.backbone import Backbone
from ..models.denoiser import embedding_dimensions, is_mixture, num_classes
from ..models.extended import class_of
from ..models.guide import load_guide
from ..models.hub import network_folder
from ..models.registry import DENOISERS
from ..models.widened import with_null_class
from ..schema import check
from .run import Run
from .same_data import other_data
from .same_process import check_process
from .step import draw_rows, draw_step
from .step_noise import PURE_NOISE, StepNoise

KEY = "objective.distillation.teacher"
GUIDE_KEY = "objective.distillation.guide"


def load_teacher(run: Run, mixture: Backbone) -> ModelMixin:
    """Load the Gaussian teacher of a mixture, frozen, on the device: the configured one, or ``init_from``.

    Raises UserError unless it is a Gaussian denoiser of the same latents and classes.
    """
    source = run.config.objective.distillation.teacher or run.config.init_from
    if source is None:
        raise UserError(f"{KEY}: expected the folder of a Gaussian model, or init_from, found None")
    folder = network_folder(source, KEY)
    check_process(run.config.diffusion, folder, KEY)
    if (difference := other_data(run, folder)) is not None:
        raise UserError(f"{KEY}: expected a model of these latents and classes, found in {folder.parent} {difference}")
    kind = class_of(folder) or "none"
    check(kind in DENOISERS, KEY, f"the folder of one of {', '.join(DENOISERS)} (RUN/model/unet)", f"{kind} in {folder}")
    teacher = DENOISERS[kind].from_pretrained(folder, use_safetensors=True)
    check(not is_mixture(teacher), KEY, "a Gaussian model", f"a mixture in {folder}")
    classes = mixture.config.num_classes
    if isinstance(teacher, UNet2DModel) and classes and (extended := with_null_class(teacher, classes)) is not teacher:
        teacher, dropout, settings = extended, run.config.label_dropout, run.config.objective.distillation
        reason = f"since the teacher in {folder} was not trained without labels"
        check(dropout == 0, "label_dropout", f"0, {reason}", dropout)
        unguided = settings.guidance_scale == 1 or settings.guide is not None
        check(unguided, "objective.distillation.guidance_scale", f"1, {reason}", settings.guidance_scale)
    for name, found, wanted in (
        ("in_channels", teacher.config.in_channels, mixture.config.in_channels),
        ("num_classes", num_classes(teacher), classes),
        ("embedding_dimensions", embedding_dimensions(teacher), embedding_dimensions(mixture)),
    ):
        check(found == wanted, KEY, f"{name} {wanted}, like the model", found)
    return teacher.to(run.accelerator.device).requires_grad_(False)


def load_teacher_guide(run: Run, teacher: ModelMixin) -> ModelMixin | None:
    """Load the weaker Gaussian model that the teacher is guided away from; None if none is configured.

    Raises UserError unless it has the latents, classes and forward process of the teacher.
    """
    source = run.config.objective.distillation.guide
    if source is None:
        return None
    folder = network_folder(source, GUIDE_KEY)
    guide = load_guide(folder, GUIDE_KEY, teacher)
    check_process(run.config.diffusion, folder, GUIDE_KEY)
    check(not is_mixture(guide), GUIDE_KEY, "a Gaussian model", f"a mixture in {source}")
    return guide


def draw_with_pure_noise(
    run: Run, path: GaussianPath, batch: LatentBatch, images_seen: int, draws: int, number: int = 0
) -> StepNoise:
    """Draw as ``draw_step``, but set t to the last timestep, where sampling begins, for a fraction of the images
    (``objective.distillation.pure_noise_fraction``)."""
    noise = draw_step(run, path, batch, images_seen, draws, number)
    fraction = run.config.objective.distillation.pure_noise_fraction

    def draw(generator: torch.Generator, count: int) -> list[torch.Tensor]:
        return [torch.rand(count, generator=generator, device=generator.device) < fraction]

    [pure] = draw_rows(run, batch, (images_seen, number, PURE_NOISE), draw)
    noise.t = torch.where(pure, path.last, noise.t)
    return noise
