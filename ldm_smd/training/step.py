"""How a run learns: a learner owns the networks that are trained, and takes one step at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from einops import rearrange

from ..autoencoder import sample_latents
from ..data.stream import LatentBatch
from ..diffusion.objectives import objective, timestep_weight
from ..models.denoiser import known_labels
from .build import initial_model
from .run import Run
from .step_noise import StepNoise, draw_step_noise, step_seed
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


def learner_for(run: Run) -> Learner:
    """Choose by the objective; all so far compare the prediction of one network with a target."""
    return Denoising(run)


class Denoising:
    """The denoiser learns alone: draw latents, noise and eta; predict; compare."""

    def __init__(self, run: Run) -> None:
        config, score = run.config, run.config.objective
        network = initial_model(run)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.run, self.process = run, run.process()
        self.model = TrainedNetwork(network, optimizer)
        self.networks = {"model": self.model}
        self.objective = objective(score.name, score.beta, score.diversity, score.patches, score.bandwidth)
        self.exponent = score.beta if score.name == "energy" else 2.0
        self.draws = score.draws if network.is_mixture else 0
        self.null_class = network.config.num_classes

    def step(self, batch: LatentBatch, images_seen: int, learning_rate: float) -> dict[str, torch.Tensor]:
        self.model.network.zero_grad()
        loss = self.backward(batch, self.draw(batch, images_seen))
        return {"loss": loss, "gradient_norm": self.model.descend(learning_rate, self.run.config.gradient_clip)}

    def draw(self, batch: LatentBatch, images_seen: int) -> StepNoise:
        """Draw the random numbers of this process's part of a batch, a function of (seed, images_seen): a resumed run draws the
        same, on any number of processes."""
        config, accelerator = self.run.config, self.run.accelerator
        size, rank = len(batch.labels), accelerator.process_index
        generator = torch.Generator(accelerator.device).manual_seed(step_seed(config.seed, images_seen))
        shape = (size * accelerator.num_processes, *batch.moments.shape[2:])
        noise = draw_step_noise(generator, shape, self.draws, self.process, config.label_dropout)
        torch.manual_seed(step_seed(config.seed, images_seen, rank))  # for dropout inside the network
        return noise.rows(rank * size, (rank + 1) * size)

    def backward(self, batch: LatentBatch, noise: StepNoise) -> torch.Tensor:
        """Add the gradients of a batch, in ``accumulate`` parts; returns its mean loss."""
        size, accelerator = len(batch.labels), self.run.accelerator
        part = -(-size // self.run.config.accumulate)
        total = torch.zeros((), device=batch.labels.device)
        for start in range(0, size, part):
            rows = (start, min(start + part, size))
            # Processes exchange gradients once, with the last part.
            with accelerator.no_sync(self.model.forward) if rows[1] < size else nullcontext():
                loss = self.losses(batch.rows(*rows), noise.rows(*rows)).sum() / size
                accelerator.backward(loss)
            total += loss.detach()
        return total

    def losses(self, batch: LatentBatch, noise: StepNoise) -> torch.Tensor:
        """Return the loss of each image, (b,)."""
        config, t, prediction_type = self.run.config, noise.t, self.run.config.diffusion.prediction_type
        x0 = self.run.autoencoder.normalise(sample_latents(batch.moments, noise=noise.posterior))
        eta = rearrange(noise.eta, "b m ... -> (b m) ...") if noise.eta.shape[1] else None
        x_t, target = self.process.noise(x0, noise.eps, t), self.process.target(x0, noise.eps, t, prediction_type)
        labels = known_labels(batch.labels, self.null_class)
        if labels is not None:
            labels = torch.where(noise.drop_label, self.null_class, labels)
        embeds = batch.embeddings
        inputs = {} if embeds is None else {"image_embeds": embeds.float() * ~noise.drop_embedding[:, None]}
        with self.run.accelerator.autocast():  # which a prepared model has by itself, but not under FSDP
            prediction = self.model.forward(x_t, t, labels, eta, return_dict=False, **inputs)[0].float()
        losses = self.objective(rearrange(prediction, "(b m) ... -> b m ...", b=len(x0)), target)
        return losses * timestep_weight(config.objective.weighting, self.exponent, self.process, t, prediction_type)
