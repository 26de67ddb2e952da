"""Training steps. A learner owns the networks being trained and takes one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from accelerate import Accelerator
from einops import rearrange

from ..autoencoder import sample_latents
from ..data.stream import LatentBatch
from ..diffusion.objectives import objective, timestep_weight
from ..diffusion.process import GaussianPath
from ..models.denoiser import model_labels
from .build import initial_model
from .run import Run
from .settings import TrainConfig
from .step_noise import DROPOUT, NOISE, StepNoise, draw_in_blocks, draw_step_noise, step_seed
from .trained import TrainedNetwork, adamw


class Learner(Protocol):
    """Interface between the training loop and an objective.

    Attributes:
        networks: all networks being trained, by their name in checkpoints. "model" is the one that is averaged and saved in the
            model folder; the name "ema" is reserved.
    """

    networks: dict[str, TrainedNetwork]

    def step(self, batch: LatentBatch, images_seen: int, learning_rate: float) -> dict[str, torch.Tensor]:
        """Update every network on this process's slice of a batch.

        Returns scalars to average and log, including "loss", the same names at every step. They stay on the device: reading
        them here would synchronise with it.
        """


class Denoising:
    """Trains the denoiser by itself: draw latents, noise and eta, predict, compare with the target."""

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
        """Accumulate the gradients of a batch, in ``micro_batches``; returns its mean loss."""
        size, accelerator = len(batch.labels), self.run.accelerator
        total = torch.zeros((), device=batch.labels.device)
        for rows, last in micro_batches(size, self.run.config.micro_batches):
            with gradients_exchanged(accelerator, [self.model], last):
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
        conditions = model_conditions(self.run, batch, noise, self.model.network.config.num_classes)
        with self.run.accelerator.autocast():  # a prepared model does this itself, except under FSDP
            prediction = self.model.forward(x_t, t, eta=eta, return_dict=False, **conditions)[0].float()
        predictions = rearrange(prediction, "(b m) ... -> b m ...", b=len(x0))
        return compare_draws(config.objective.name, config, self.process, predictions, target, t)


def compare_draws(
    name: str, config: TrainConfig, path: GaussianPath, predictions: torch.Tensor, target: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Return the objective called ``name`` of draws (B, M, C, h, w) for a target (B, C, h, w), weighted for t: (B,)."""
    score = config.objective
    compare = objective(name, score.beta, score.diversity, score.patch_sizes, score.bandwidth)
    exponent = score.beta if name == "energy" else 2.0
    weight = timestep_weight(score.weighting, exponent, path, t, config.diffusion.predicts)
    return compare(predictions, target) * weight


def trained_model(run: Run, momentum: float = 0.9) -> TrainedNetwork:
    """Make the initial denoiser of a run and its optimizer."""
    network, config = initial_model(run).train(), run.config  # from_pretrained returns it in evaluation mode
    return TrainedNetwork(network, adamw(network, config.learning_rate, config.weight_decay, momentum))


def draw_step(run: Run, path: GaussianPath, batch: LatentBatch, images_seen: int, draws: int, number: int = 0) -> StepNoise:
    """Draw the random numbers for this process's slice of a batch, with ``draws`` of eta per image.

    They are a function of (seed, images_seen, number), so a resumed run draws the same on any number of processes.
    """
    config, shape = run.config, batch.moments.shape[2:]

    def draw(generator: torch.Generator, count: int) -> Iterable[torch.Tensor]:
        options = (draws, path, config.label_dropout, config.timestep_shift)
        return vars(draw_step_noise(generator, (count, *shape), *options)).values()

    noise = StepNoise(*draw_rows(run, batch, (images_seen, number, NOISE), draw))
    # For dropout inside the network.
    torch.manual_seed(step_seed(config.seed, images_seen, number, DROPOUT, run.accelerator.process_index))
    return noise


def draw_rows(
    run: Run,
    batch: LatentBatch,
    seed: Sequence[int],
    draw: Callable[[torch.Generator, int], Iterable[torch.Tensor]],
) -> list[torch.Tensor]:
    """Draw random numbers for this process's rows of the batch of all processes. ``seed`` follows that of the run."""
    accelerator, rows = run.accelerator, rows_of_process(run, batch)
    count = accelerator.num_processes * len(rows)
    return draw_in_blocks(rows, count, (run.config.seed, *seed), accelerator.device, draw)


def rows_of_process(run: Run, batch: LatentBatch) -> range:
    """Return which rows of the batch of all processes are this process's."""
    size = len(batch.labels)
    return range(size * run.accelerator.process_index, size * (run.accelerator.process_index + 1))


@contextmanager
def gradients_exchanged(accelerator: Accelerator, networks: Iterable[TrainedNetwork], last: bool) -> Iterator[None]:
    """Within the context, let processes exchange gradients only with the ``last`` micro-batch. Under FSDP they do so with each:
    otherwise every process would hold all gradients, in float32."""
    with ExitStack() as waiting:
        for trained in () if last or accelerator.is_fsdp2 else networks:
            waiting.enter_context(accelerator.no_sync(trained.forward))
        yield


def micro_batches(size: int, count: int) -> Iterator[tuple[tuple[int, int], bool]]:
    """Yield (start, stop) rows of each of ``count`` micro-batches, and whether it is the last one."""
    part = -(-size // count)
    for start in range(0, size, part):
        yield (start, min(start + part, size)), start + part >= size


def model_conditions(run: Run, batch: LatentBatch, noise: StepNoise, null_class: int | None) -> dict[str, torch.Tensor | None]:
    """Return labels and embeddings as arguments of a model, coarsened or dropped as ``noise`` decides."""
    labels = model_labels(batch.labels, null_class)
    if labels is not None and run.coarse is not None:
        fraction, parts = run.config.coarse_label_fraction, run.coarse.shape[1]
        chosen = (noise.coarse / fraction * parts).long().clamp_max(parts - 1)
        coarsened = (noise.coarse < fraction) & (batch.labels >= 0)
        labels = torch.where(coarsened, run.coarse[batch.labels, chosen], labels)
    if labels is not None and null_class is not None:
        labels = torch.where(noise.drop_label, null_class, labels)
    embeds = batch.embeddings
    inputs = {} if embeds is None else {"image_embeds": embeds.float() * ~noise.drop_embedding[:, None]}
    return {"class_labels": labels, **inputs}
