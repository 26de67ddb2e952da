"""Previews during a run: a grid of samples, and a check whether the mixture has collapsed."""

from __future__ import annotations

import logging

from torchvision.utils import make_grid, save_image

from ..evaluation.diagnostics import COLLAPSED, diagnostic_timesteps, has_collapsed, nearest_neighbour_ratio, spread_over_eta
from ..models.backbone import Backbone
from ..models.denoiser import model_labels
from ..pipelines import seeded_generators
from .metrics_log import MetricsLog
from .model_folder import build_pipeline
from .run import Run

logger = logging.getLogger(__name__)

SPREAD_IMAGES = 16
PREVIEW_IMAGES = 40
ALIKE = 0.5
"""Warn below this spread of the draws at the noisiest timestep, relative to the posterior's."""


def preview(run: Run, unet: Backbone, images_seen: int, log: MetricsLog) -> None:
    """Log a grid of samples from fixed seeds and the spread over eta per timestep, from the EMA weights."""
    device = unet.device  # the CPU, if the training weights are sharded
    pipeline = build_pipeline(run, unet.to(run.accelerator.device))
    pipeline.set_progress_bar_config(disable=True)
    classes = unet.config.num_classes
    labels = None if classes is None else [index % classes for index in range(PREVIEW_IMAGES)]
    generators = seeded_generators(range(PREVIEW_IMAGES))
    images = pipeline(labels, PREVIEW_IMAGES, run.config.sample_steps, generator=generators, output_type="pt")[0]
    grid = make_grid(images.cpu(), nrow=10, padding=2, pad_value=0.7)
    path = run.output / "samples" / f"{images_seen:012d}.png"
    path.parent.mkdir(exist_ok=True)
    save_image(grid, path)
    log.image(images_seen, "samples", grid)
    if unet.is_mixture:
        log_spread(run, unet, images_seen, log)
    unet.to(device)


def log_spread(run: Run, unet: Backbone, images_seen: int, log: MetricsLog) -> None:
    """Log the spread of the draws of the mixture, for one x_t and from pure noise; warn if it has collapsed."""
    batch, process = run.batches().batch_at(0).rows(0, SPREAD_IMAGES).to(run.accelerator.device), run.process()
    latents = run.autoencoder.normalise(batch.moments[:, 0].float())
    known = model_labels(batch.labels, unet.config.num_classes)
    steps = diagnostic_timesteps(process)
    spread = spread_over_eta(unet, process, run.config.diffusion.predicts, latents, known, steps)
    values = {f"spread/{t}": at.over_eta for t, at in spread.items()}
    values |= {f"spread_ratio/{t}": at.ratio for t, at in spread.items()}
    values |= {f"gain/{t}": at.gain for t, at in spread.items()}
    if len(latents) > 1:
        values["nearest_neighbour_ratio"] = nearest_neighbour_ratio(
            unet, process, run.config.diffusion.predicts, latents, known
        )
    log.log(images_seen, values)
    if has_collapsed(spread):
        logger.warning(
            "the mixture has collapsed: the spread of its draws is below %.0f %% of the posterior's at every timestep%s",
            100 * COLLAPSED,
            "; the mse objective causes this, use objective.name=energy" if run.config.objective.name == "mse" else "",
        )
    elif run.config.objective.name == "distillation" and spread[steps[-1]].ratio < ALIKE:
        logger.warning(
            "the draws from noise are alike: their spread at t = %d is %.0f %% of the posterior's, and samples may repeat; "
            "raise objective.distillation.second_view_shift, train with objective.name=energy before, or stop earlier",
            steps[-1],
            100 * spread[steps[-1]].ratio,
        )
