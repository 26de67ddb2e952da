"""How a run learns: a learner owns the networks that are trained, and takes one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Protocol

import torch
from einops import rearrange

from ..autoencoder import sample_latents
from ..data.stream import LatentBatch
from ..diffusion.objectives import objective, timestep_weight
from ..diffusion.process import DiffusionProcess
from ..models.denoiser import known_labels
from .build import initial_model
from .draws import Draws, draw, step_seed
from .run import Run
from .trained import TrainedNetwork


class Learner(Protocol):
    """What the loop trains.

    Attributes:
        networks: all that are trained, by name, in checkpoints too. "model" is the one that averages and the model folder are
            of; none is called "ema".
    """

    networks: dict[str, TrainedNetwork]

    def step(self, batch: LatentBatch, images_seen: int, learning_rate: float) -> dict[str, torch.Tensor]:
        """Update every network on this process's part of a batch; returns scalars on the device, to be averaged and logged,
        "loss" among them, the same ones at every step. Reading one here would make the host wait."""


class Denoising:
    """The denoiser learns alone: draw latents, noise and eta; predict; compare."""

    def __init__(self, run: Run) -> None:
        o = run.config.objective
        self.run, self.process, self.model = run, run.process(), trained_model(run)
        self.networks = {"model": self.model}
        self.objective = objective(o.name, o.beta, o.diversity, o.patches, o.bandwidth)
        self.exponent = o.beta if o.name == "energy" else 2.0
        self.draws = o.draws if self.model.network.is_mixture else 0

    def step(self, batch: LatentBatch, images_seen: int, learning_rate: float) -> dict[str, torch.Tensor]:
        self.model.network.zero_grad()
        loss = self.backward(batch, draw_step(self.run, self.process, batch, images_seen, self.draws))
        norm = self.model.descend(learning_rate, self.run.config.gradient_clip)
        return {"loss": loss, "gradient_norm": norm}

    def backward(self, batch: LatentBatch, draws: Draws) -> torch.Tensor:
        """Add the gradients of a batch, in ``accumulate`` parts; returns its mean loss."""
        total = torch.zeros((), device=batch.labels.device)
        for rows, last in parts(len(batch.labels), self.run.config.accumulate):
            # Processes exchange gradients once, with the last part.
            with nullcontext() if last else self.run.accelerator.no_sync(self.model.forward):
                loss = self.losses(batch.rows(*rows), draws.rows(*rows)).sum() / len(batch.labels)
                self.run.accelerator.backward(loss)
            total += loss.detach()
        return total

    def losses(self, batch: LatentBatch, draws: Draws) -> torch.Tensor:
        """Return the loss of each image, (b,)."""
        config, t = self.run.config, draws.t
        x0 = self.run.autoencoder.normalise(sample_latents(batch.moments, noise=draws.posterior))
        eta = rearrange(draws.eta, "b m ... -> (b m) ...") if draws.eta.shape[1] else None
        prediction_type = config.diffusion.prediction_type
        x_t = self.process.noise(x0, draws.eps, t)
        target = self.process.target(x0, draws.eps, t, prediction_type)
        conditions = known_conditions(batch, draws, self.model.network.config.num_classes)
        with self.run.accelerator.autocast():  # which a prepared model has by itself, but not under FSDP
            prediction = self.model.forward(x_t, t, eta=eta, return_dict=False, **conditions)[0].float()
        losses = self.objective(rearrange(prediction, "(b m) ... -> b m ...", b=len(x0)), target)
        return losses * timestep_weight(config.objective.weighting, self.exponent, self.process, t, prediction_type)


def trained_model(run: Run) -> TrainedNetwork:
    """The denoiser as a training starts with it, and its optimizer."""
    network, config = initial_model(run), run.config
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=decay, fused=True
    )
    return TrainedNetwork(network, optimizer)


def draw_step(run: Run, process: DiffusionProcess, batch: LatentBatch, images_seen: int, count: int) -> Draws:
    """Draw the random numbers of this process's part of a batch, ``count`` of eta for each image.

    They are a function of (seed, images_seen): a resumed run draws what it would have drawn, and so do processes of
    another number.
    """
    config, accelerator = run.config, run.accelerator
    size, rank = len(batch.labels), accelerator.process_index
    generator = torch.Generator(accelerator.device).manual_seed(step_seed(config.seed, images_seen))
    shape = (size * accelerator.num_processes, *batch.moments.shape[2:])
    draws = draw(generator, shape, count, process.num_timesteps, config.label_dropout)
    torch.manual_seed(step_seed(config.seed, images_seen, rank))  # for dropout inside the network
    return draws.rows(rank * size, (rank + 1) * size)


def parts(size: int, count: int) -> Iterator[tuple[tuple[int, int], bool]]:
    """The first and last row of each of ``count`` parts of a batch, and whether it is the last part."""
    part = -(-size // count)
    for start in range(0, size, part):
        yield (start, min(start + part, size)), start + part >= size


def known_conditions(batch: LatentBatch, draws: Draws, null_class: int | None) -> dict[str, torch.Tensor | None]:
    """Labels and embeddings as a model takes them, left out where the draws say so."""
    labels = known_labels(batch.labels, null_class)
    if labels is not None and null_class is not None:
        labels = torch.where(draws.dropped, null_class, labels)
    embeds = {} if batch.embeddings is None else {"image_embeds": batch.embeddings.float() * ~draws.unlike[:, None]}
    return {"class_labels": labels, **embeds}
