"""Posterior distillation: a mixture learns q(x_0 | x_t) from a Gaussian model, noise-conditional variational score distillation
(NCVSD, Cheng et al., ICML 2025, arXiv 2506.09416) for SMD's networks."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from einops import rearrange

from ..autoencoder import sample_latents
from ..data.stream import LatentBatch
from ..diffusion.process import x0_per_prediction
from ..diffusion.two_views import joined_view
from ..errors import UserError
from .critic import beside, gaussian, seeing_also
from .run import Run
from .step import draw_step, known_conditions, parts, trained_model, whole_batch
from .step_noise import StepNoise
from .trained import TrainedNetwork, adamw

NEAREST, FARTHEST = 0.02, 0.98
"""Part of the timesteps that the second view is taken at."""
SMALLEST = 1e-4
MOMENTUM = 0.0
"""Where each network follows the other, old gradients mislead (docs/mixtures.md)."""


@dataclass
class TwoViews(StepNoise):
    """Attributes:
    r: timesteps of the second view, (B,).
    second_eps: its noise, (B, C, h, w).
    """

    r: torch.Tensor
    second_eps: torch.Tensor


class Distillation:
    """A draw of the mixture, x = D(x_t, eta), is noised again: x_r = a_r x + s_r eps'. If x were a true draw of q(x_0 | x_t),
    x_t and x_r would be two independent views of one x_0, and as good as one, x_u (diffusion/two_views.py). So the frozen
    teacher gives the score of the true q(x_r | x_t), and a critic, trained by the denoising loss on the mixture's draws, that
    of the mixture. The loss of an image, with goal constant, follows the gradient of their KL divergence:

        goal = x - (D_critic(x_u, u) - D_teacher(x_u, u)) / mean |x - D_teacher(x_u, u)|,    loss = |x - goal|^2 / (2 s_t)

    What the critic cannot see it cannot miss, so it sees x_t beside x_u; else draws could be good images that x_t does not
    allow (docs/mixtures.md). It starts as the teacher, which is the critic of true draws.
    """

    def __init__(self, run: Run) -> None:
        config, settings = run.config, run.config.objective.distillation
        self.run, self.process, self.model = run, run.process(), trained_model(run, MOMENTUM)
        source = settings.teacher or config.init_from
        if source is None:
            raise UserError("objective.distillation.teacher: expected the folder of a Gaussian model, or init_from, found None")
        self.teacher = gaussian(source, run, self.model.network).requires_grad_(False)
        self.sees_x_t = settings.views == "conditional"
        channels = self.model.network.config.in_channels
        critic = (seeing_also(self.teacher, channels) if self.sees_x_t else copy.deepcopy(self.teacher)).requires_grad_(True)
        rate = settings.critic_learning_rate
        self.critic = TrainedNetwork(critic, adamw(critic, rate, momentum=MOMENTUM))
        self.critic_rate = rate / config.learning_rate
        self.networks = {"model": self.model, "critic": self.critic}

    def step(self, batch: LatentBatch, images_seen: int, learning_rate: float) -> dict[str, torch.Tensor]:
        run, size = self.run, len(batch.labels)
        for trained in self.networks.values():
            trained.network.zero_grad()
        noise = self.draw(batch, images_seen)
        totals = dict.fromkeys(("loss", "critic_loss", "teacher_loss"), torch.zeros((), device=batch.labels.device))
        for rows, last in parts(size, run.config.accumulate):
            with ExitStack() as waiting:
                for trained in () if last else self.networks.values():
                    waiting.enter_context(run.accelerator.no_sync(trained.forward))
                losses = self.losses(batch.rows(*rows), noise.rows(*rows))
                for name in ("loss", "critic_loss"):
                    run.accelerator.backward(losses[name].sum() / size)
            totals = {name: total + losses[name].detach().sum() / size for name, total in totals.items()}
        norm = self.model.descend(learning_rate, run.config.gradient_clip)
        self.critic.descend(learning_rate * self.critic_rate, run.config.gradient_clip)
        return totals | {"gradient_norm": norm}

    def losses(self, batch: LatentBatch, noise: TwoViews) -> dict[str, torch.Tensor]:
        """Return the model's loss, the critic's, and the teacher's error where the critic's is taken, each (b,)."""
        run, path = self.run, self.process
        prediction_type, t, r = run.config.diffusion.prediction_type, noise.t, noise.r
        x0 = run.autoencoder.normalise(sample_latents(batch.moments, noise=noise.posterior))
        x_t = path.noise(x0, noise.eps, t)
        conditions = known_conditions(batch, noise, self.model.network.config.num_classes)
        eta = rearrange(noise.eta, "b m ... -> (b m) ...")
        with run.accelerator.autocast():
            prediction = self.model.forward(x_t, t, eta=eta, return_dict=False, **conditions)[0].float()
        x = path.to_x0(prediction, x_t, t, prediction_type)

        drawn = x.detach()
        view, u = path.noise(drawn, noise.second_eps, r), r
        if run.config.objective.distillation.views != "marginal":
            view, u = joined_view(path, x_t, t, view, r)
        seen, known = beside(view, x_t, t, conditions) if self.sees_x_t else (view, conditions)
        with run.accelerator.autocast():
            critic = self.critic.forward(seen, u, return_dict=False, **known)[0].float()
            with torch.no_grad():
                teacher = self.teacher(view, u, return_dict=False, **conditions)[0].float()
        true, own = (path.to_x0(said, view, u, prediction_type) for said in (teacher, critic))
        scale = (drawn - true).abs().flatten(1).mean(dim=1).clamp_min(SMALLEST).view(-1, 1, 1, 1)
        goal = drawn - (own.detach() - true) / scale
        weight = 1.0 / path.signal_and_noise(t, t)[1]  # an error of v is one of x_0 over s_t

        gain = x0_per_prediction(prediction_type, *path.signal_and_noise(u, view))
        return {
            "loss": 0.5 * weight * (x - goal).square().flatten(1).mean(dim=1),
            "critic_loss": ((own - drawn) / gain).square().flatten(1).mean(dim=1),
            "teacher_loss": ((true - drawn) / gain).square().flatten(1).mean(dim=1),
        }

    def draw(self, batch: LatentBatch, images_seen: int) -> TwoViews:
        """Draw this process's part of the random numbers, of which more t are the last than in other trainings."""
        run, last, settings = self.run, self.process.last, self.run.config.objective.distillation
        noise = draw_step(run, self.process, batch, images_seen, 1)
        generator, count, rows = whole_batch(run, batch, images_seen, 0, 1)
        device = generator.device
        pure = torch.rand(count, generator=generator, device=device) < settings.pure_noise
        r = torch.empty(count, device=device).uniform_(NEAREST * last, FARTHEST * last, generator=generator).round().long()
        eps = torch.randn((count, *noise.eps.shape[1:]), generator=generator, device=device)
        noise.t = torch.where(pure[rows], last, noise.t)
        return TwoViews(**vars(noise), r=r[rows], second_eps=eps[rows])
