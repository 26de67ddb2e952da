"""Posterior distillation: a mixture learns q(x_0 | x_t) from a Gaussian model.

This is noise-conditional variational score distillation (NCVSD, Cheng et al., ICML 2025, arXiv 2506.09416) for SMD networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from einops import rearrange

from ..autoencoder import sample_latents
from ..data.stream import LatentBatch
from ..diffusion.backward_simulation import STEP_COUNTS, simulate_backward
from ..diffusion.two_views import draw_second_timesteps
from .critics import Conditions, make_critic
from .distillation_losses import DistillationLosses, critic_objective
from .run import Run
from .step import compare_draws, draw_rows, gradients_exchanged, micro_batches, model_conditions, rows_of_process, trained_model
from .step_noise import SECOND_VIEW, SIMULATION, StepNoise, step_seed
from .teacher import draw_with_pure_noise, load_teacher, load_teacher_guide
from .trained import TrainedNetwork, adamw

MOMENTUM = 0.0
"""First beta of AdamW. Mixture and critic follow each other, so old gradients mislead (docs/mixtures.md)."""


@dataclass
class TwoViews(StepNoise):
    """Attributes:
    r: timesteps of the second view, (B,).
    second_eps: its noise, (B, C, h, w).
    chosen: whether x_t is to be from the mixture's own sampling, (B,). On the CPU, so that their number is known without a wait
        for the device.
    simulated: whether it is, (B,): where chosen, unless x_t is pure noise.
    first: the pure noise that the sampling starts from, (B, C, h, w).
    etas, noises: the random numbers of its steps, (B, S, C, h, w). S is the same for all images.
    """

    r: torch.Tensor
    second_eps: torch.Tensor
    chosen: torch.Tensor
    simulated: torch.Tensor
    first: torch.Tensor
    etas: torch.Tensor
    noises: torch.Tensor


class Distillation:
    """Trains a mixture and its critic.

    A draw of the mixture, x = D(x_t, eta), is noised again: x_r = a_r x + s_r eps'. If x were a true draw of q(x_0 | x_t), then
    x_t and x_r would be two independent noisy views of one x_0, equivalent to a single one, x_u (diffusion/two_views.py). So
    the frozen teacher gives the score of the true q(x_r | x_t). The critic gives that of the mixture; it is trained with the
    denoising loss on the mixture's draws. The loss of the mixture follows the gradient of their KL divergence
    (DistillationLosses). The critic starts as a copy of the teacher, the optimal critic of true draws.

    With an ``energy_weight``, the energy score of several draws is added. It is proper, so it has the same optimum,
    and it keeps the draws from becoming alike when the critic cannot follow them.
    """

    def __init__(self, run: Run) -> None:
        config, settings = run.config, run.config.objective.distillation
        self.run, self.process, self.model = run, run.process(), trained_model(run, MOMENTUM)
        self.teacher = load_teacher(run, self.model.network)
        mean_over_processes = partial(run.accelerator.reduce, reduction="mean")
        self.distillation_losses = DistillationLosses(
            self.process, config.diffusion.predicts, settings, mean_over_processes, load_teacher_guide(run, self.teacher)
        )
        if config.compile and settings.adversarial_weight > 0:
            # Two backward passes use the critic's graph. A compiled graph may free its memory after the first.
            torch._functorch.config.donated_buffer = False
        critic = make_critic(self.teacher, settings)
        rate = settings.critic_learning_rate
        self.critic = TrainedNetwork(critic, adamw(critic, rate, momentum=MOMENTUM))
        self.critic_rate = rate / config.learning_rate
        self.networks = {"model": self.model, "critic": self.critic}

    def step(self, batch: LatentBatch, images_seen: int, learning_rate: float) -> dict[str, torch.Tensor]:
        clip, critic_rate = self.run.config.gradient_clip, learning_rate * self.critic_rate
        for number in range(1, self.run.config.objective.distillation.critic_updates):
            self.backward(batch, self.draw(batch, images_seen, number), ["critic"])
            self.critic.descend(critic_rate, clip)
        losses = self.backward(batch, self.draw(batch, images_seen), ["model", "critic"])
        norm = self.model.descend(learning_rate, clip)
        self.critic.descend(critic_rate, clip)
        return losses | {"gradient_norm": norm}

    def backward(self, batch: LatentBatch, noise: TwoViews, names: list[str]) -> dict[str, torch.Tensor]:
        """Set the gradients of the named networks for a batch, in ``micro_batches``; returns the mean losses."""
        run, size = self.run, len(batch.labels)
        learning = [self.networks[name] for name in names]
        totals: dict[str, torch.Tensor] = {}
        for trained in learning:
            trained.network.zero_grad()
        for rows, last in micro_batches(size, run.config.micro_batches):
            with gradients_exchanged(run.accelerator, learning, last):
                losses = self.losses(batch.rows(*rows), noise.rows(*rows), "model" in names)
                for name in names:
                    objective = losses["loss"] if name == "model" else critic_objective(losses)
                    run.accelerator.backward(objective.sum() / size)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.detach().sum() / size
        return totals

    def losses(self, batch: LatentBatch, noise: TwoViews, model_learns: bool = True) -> dict[str, torch.Tensor]:
        """Compute ``DistillationLosses.losses``: those of the critic alone, unless ``model_learns``."""
        run, path = self.run, self.process
        prediction_type, t = run.config.diffusion.predicts, noise.t
        x0 = run.autoencoder.normalise(sample_latents(batch.moments, noise=noise.posterior))
        conditions = model_conditions(run, batch, noise, self.model.network.config.num_classes)
        x_t = path.noise(x0, noise.eps, t)
        if run.config.objective.distillation.backward_simulation_fraction > 0:
            rows, own = self.sampled(noise, conditions)
            x_t = torch.where(noise.simulated.view(-1, 1, 1, 1), x_t.index_copy(0, rows, own), x_t)
        eta = rearrange(noise.eta, "b m ... -> (b m) ...")
        with run.accelerator.autocast(), torch.set_grad_enabled(model_learns):
            prediction = self.model.forward(x_t, t, eta=eta, return_dict=False, **conditions)[0].float()
        predictions = rearrange(prediction, "(b m) ... -> b m ...", b=len(x0))
        x = path.to_x0(predictions[:, 0], x_t, t, prediction_type)

        with run.accelerator.autocast():
            networks = (self.teacher if model_learns else None), self.critic.network
            second = noise.r, noise.second_eps
            losses = self.distillation_losses.losses(
                *networks, x, x0, x_t, t, *second, conditions, self.critic.forward, noise.simulated
            )
        weight = run.config.objective.distillation.energy_weight
        if weight > 0 and model_learns:
            target = path.target(x0, noise.eps, t, prediction_type)
            score = compare_draws("energy", run.config, path, predictions, target, t)
            # Draws of marginal views may depend on the noise in x_t. The score would forbid that.
            score = score * ~self.distillation_losses.is_marginal(t, noise.simulated)
            losses |= {"loss": losses["loss"] + weight * score, "energy_score": score}
        return losses

    @torch.no_grad()
    def sampled(self, noise: TwoViews, conditions: Conditions) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample x_t of the chosen images with the mixture. Returns their rows, (N,), and x_t, (N, C, h, w)."""
        chosen = noise.chosen.nonzero()[:, 0]
        if not len(chosen):  # other processes may have chosen images, and FSDP's wait for one another in each evaluation
            chosen = torch.zeros(1, dtype=torch.long)
        rows = chosen.to(noise.t.device, non_blocking=True)
        given = {name: value if value is None else value[rows] for name, value in conditions.items()}
        predicts = self.run.config.diffusion.predicts

        def draw(x: torch.Tensor, t: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
            with self.run.accelerator.autocast():
                prediction = self.model.forward(x, t, eta=eta, return_dict=False, **given)[0].float()
            return self.process.to_x0(prediction, x, t, predicts)

        numbers = noise.first[rows], noise.t[rows], noise.etas[rows], noise.noises[rows]
        return rows, simulate_backward(draw, self.process, *numbers, noise.etas.shape[1])

    def draw(self, batch: LatentBatch, images_seen: int, number: int = 0) -> TwoViews:
        """Draw the random numbers for this process. ``number`` gives an independent set for every critic update; 0 is for the
        update of the mixture, which needs several draws for the energy score."""
        run, score = self.run, self.run.config.objective
        draws = score.draws if score.distillation.energy_weight > 0 and number == 0 else 1
        noise = draw_with_pure_noise(run, self.process, batch, images_seen, draws, number)
        shift, shape = score.distillation.second_view_shift, noise.eps.shape[1:]

        def second(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            r = draw_second_timesteps(self.process, count, shift, generator)
            return r, torch.randn((count, *shape), generator=generator, device=generator.device)

        fraction, steps = score.distillation.backward_simulation_fraction, 0
        if fraction > 0:  # the same number for all images, so known without waiting for the device
            steps = STEP_COUNTS[step_seed(run.config.seed, images_seen, number, SIMULATION) % len(STEP_COUNTS)]

        def simulation(generator: torch.Generator, count: int) -> list[torch.Tensor]:
            options: dict[str, Any] = {"generator": generator, "device": generator.device}
            return [torch.randn((count, *size, *shape), **options) for size in ((), (steps,), (steps,))]

        r, second_eps = draw_rows(run, batch, (images_seen, number, SECOND_VIEW), second)
        first, etas, noises = draw_rows(run, batch, (images_seen, number, SIMULATION), simulation)
        chosen = evenly_spaced(fraction, rows_of_process(run, batch))
        simulated = chosen.to(noise.t.device, non_blocking=True) & (noise.t < self.process.last)
        return TwoViews(
            **vars(noise), r=r, second_eps=second_eps, chosen=chosen, simulated=simulated, first=first, etas=etas, noises=noises
        )


def evenly_spaced(fraction: float, rows: range) -> torch.Tensor:
    """Choose a fraction of all rows, as evenly as possible; returns which of ``rows`` are chosen, on the CPU."""
    counts = (torch.arange(rows.start, rows.stop + 1, dtype=torch.float64) * fraction).floor()
    return counts.diff() > 0
