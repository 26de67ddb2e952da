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
from ..diffusion.process import GaussianPath
from ..models.denoiser import known_labels
from .build import initial_model
from .run import Run
from .step_noise import StepNoise, draw_step_noise, step_seed
from .trained import TrainedNetwork, adamw


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
        score = run.config.objective
        self.run, self.process, self.model = run, run.process(), trained_model(run)
        self.networks = {"model": self.model}
        self.draws = score.draws if self.model.network.is_mixture else 0

    def step(self, batch: LatentBatch, images_seen: int, learning_rate: float) -> dict[str, torch.Tensor]:
        self.model.network.zero_grad()
        loss = self.backward(batch, self.draw(batch, images_seen))
        return {"loss": loss, "gradient_norm": self.model.descend(learning_rate, self.run.config.gradient_clip)}

    def draw(self, batch: LatentBatch, images_seen: int) -> StepNoise:
        return draw_step(self.run, self.process, batch, images_seen, self.draws)

    def backward(self, batch: LatentBatch, noise: StepNoise) -> torch.Tensor:
        """Add the gradients of a batch, in ``micro_batches``; returns its mean loss."""
        size, accelerator = len(batch.labels), self.run.accelerator
        total = torch.zeros((), device=batch.labels.device)
        for rows, last in parts(size, self.run.config.micro_batches):
            # Processes exchange gradients once, with the last part.
            with nullcontext() if last else accelerator.no_sync(self.model.forward):
                loss = self.losses(batch.rows(*rows), noise.rows(*rows)).sum() / size
                accelerator.backward(loss)
            total += loss.detach()
        return total

    def losses(self, batch: LatentBatch, noise: StepNoise) -> torch.Tensor:
        """Return the loss of each image, (b,)."""
        config, t, prediction_type = self.run.config, noise.t, self.run.config.diffusion.predicts
        x0 = self.run.autoencoder.normalise(sample_latents(batch.moments, noise=noise.posterior))
        eta = rearrange(noise.eta, "b m ... -> (b m) ...") if noise.eta.shape[1] else None
        x_t, target = self.process.noise(x0, noise.eps, t), self.process.target(x0, noise.eps, t, prediction_type)
        conditions = known_conditions(self.run, batch, noise, self.model.network.config.num_classes)
        with self.run.accelerator.autocast():  # which a prepared model has by itself, but not under FSDP
            prediction = self.model.forward(x_t, t, eta=eta, return_dict=False, **conditions)[0].float()
        score = config.objective
        compare = objective(score.name, score.beta, score.diversity, score.patch_sizes, score.bandwidth)
        exponent = score.beta if score.name == "energy" else 2.0
        losses = compare(rearrange(prediction, "(b m) ... -> b m ...", b=len(x0)), target)
        return losses * timestep_weight(score.weighting, exponent, self.process, t, prediction_type)


def trained_model(run: Run, momentum: float = 0.9) -> TrainedNetwork:
    """The denoiser as a training starts with it, and its optimizer."""
    network, config = initial_model(run), run.config
    return TrainedNetwork(network, adamw(network, config.learning_rate, config.weight_decay, momentum))


def draw_step(run: Run, path: GaussianPath, batch: LatentBatch, images_seen: int, draws: int, number: int = 0) -> StepNoise:
    """Draw the random numbers of this process's part of a batch, ``draws`` of eta for each image, as a function of
    (seed, images_seen, number): a resumed run draws the same, on any number of processes."""
    generator, count, rows = whole_batch(run, batch, images_seen, *([number] if number else []))
    shape = (count, *batch.moments.shape[2:])
    noise = draw_step_noise(generator, shape, draws, path, run.config.label_dropout)
    torch.manual_seed(step_seed(run.config.seed, images_seen, run.accelerator.process_index))  # for dropout inside the network
    return noise.rows(rows.start, rows.stop)


def whole_batch(run: Run, batch: LatentBatch, *seed: int) -> tuple[torch.Generator, int, slice]:
    """Return what random numbers of a whole batch are drawn with: a generator on the device, seeded by the run's seed and these
    integers, the images of all processes, and the rows of them that are this process's."""
    accelerator, size = run.accelerator, len(batch.labels)
    generator = torch.Generator(accelerator.device).manual_seed(step_seed(run.config.seed, *seed))
    start = accelerator.process_index * size
    return generator, size * accelerator.num_processes, slice(start, start + size)


def parts(size: int, count: int) -> Iterator[tuple[tuple[int, int], bool]]:
    """The first row and the one after the last of each of ``count`` parts of a batch, and whether it is the last part."""
    part = -(-size // count)
    for start in range(0, size, part):
        yield (start, min(start + part, size)), start + part >= size


def known_conditions(run: Run, batch: LatentBatch, noise: StepNoise, null_class: int | None) -> dict[str, torch.Tensor | None]:
    """Labels and embeddings as a model takes them, made wider or left out where the noise says so."""
    labels = known_labels(batch.labels, null_class)
    if labels is not None and run.coarse is not None:
        share, parts = run.config.coarse_label_fraction, run.coarse.shape[1]
        chosen = (noise.coarse / share * parts).long().clamp_max(parts - 1)
        labels = torch.where(noise.coarse < share, run.coarse[labels, chosen], labels)
    if labels is not None and null_class is not None:
        labels = torch.where(noise.drop_label, null_class, labels)
    embeds = batch.embeddings
    inputs = {} if embeds is None else {"image_embeds": embeds.float() * ~noise.drop_embedding[:, None]}
    return {"class_labels": labels, **inputs}
