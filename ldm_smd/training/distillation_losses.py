"""Losses of the mixture and the critic in posterior distillation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import nn

from ..diffusion.process import GaussianPath, x0_per_prediction
from ..diffusion.settings import DistillationConfig
from ..diffusion.two_views import joined_view
from ..models.denoiser import predict_all
from ..pipelines.guidance import Conditions as Given
from ..pipelines.guidance import guided_prediction
from .critics import Conditions, with_first_view

SMALLEST = 1e-4
LOGIT_WEIGHT = 0.1
"""Weight of the logit's loss in the critic's objective, relative to the denoising loss."""


@dataclass
class DistillationLosses:
    """Teacher and critic denoise x_u; their difference is the gradient for the draws x of q(x_0 | x_t):

        goal = x - (D_critic(x_u, u) - D_teacher(x_u, u)) / mean |x - D_teacher(x_u, u)|,    loss = |x - goal|^2 / (2 s_t)

    The critic also sees x_t. Otherwise draws could be good images that do not match x_t (docs/mixtures.md). But where x_t is
    nearly pure noise, most images match it. There, above ``marginal_above``, it sees only the noised draw, x_r. Then the noise
    in x_t may decide about the image, beside eta, which is easier to learn than to be independent of it. So it is for
    ``simulated`` images, whose x_t is from the mixture's own sampling: all steps together should give images like the data.

    With a ``guidance_scale`` the teacher is guided, away from ``guide`` if there is one, and the mixture learns its
    distribution.

    With an adversarial weight w, the critic has one more output channel. Its mean is the logit c(x) for telling draws from true
    x_0 of the same x_t. This adds a term of normalised size to the goal:

        + w sigmoid(-c) grad c / mean |grad c|

    This mean includes the images of the batch. ``mean_over_processes`` averages it over all processes; with ``micro_batches``
    it is the mean over one micro-batch.
    """

    path: GaussianPath
    prediction_type: str
    settings: DistillationConfig
    mean_over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda mean: mean
    guide: ModelMixin | None = None

    def losses(
        self,
        teacher: ModelMixin | None,
        critic: ModelMixin,
        x: torch.Tensor,
        x0: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        r: torch.Tensor,
        second_eps: torch.Tensor,
        conditions: Conditions,
        forward: nn.Module | None = None,
        simulated: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses per image, each (B,).

        Returns ``critic_loss`` of the critic as a denoiser and, with an adversarial weight, ``logit_loss``;
        ``critic_objective`` combines them. With a teacher, also ``loss`` of the mixture, and ``teacher_loss`` of the teacher
        on the same inputs.

        Args:
            teacher, critic: denoisers; the critic from ``make_critic``. No teacher: the losses of the critic alone.
            x: draws of the mixture for x_t, (B, C, h, w), with their graph if there is a teacher.
            x0: clean latents of x_t.
            r, second_eps: timesteps (B,) and noise of the second view.
            forward: the critic as wrapped by DDP, FSDP or torch.compile; None for the critic itself.
            simulated: whether x_t is from the mixture's own sampling, not made from ``x0``, (B,). None: nowhere.
        """
        path, weight, channels = self.path, self.settings.adversarial_weight, x.shape[1]
        marginal = self.is_marginal(t, simulated)
        drawn = x.detach().requires_grad_(weight > 0 and teacher is not None)
        view, u = self.view(drawn, x_t, t, r, second_eps, marginal)
        inputs_of = partial(self.critic_inputs, critic, x_t=x_t, t=t, conditions=conditions, marginal=marginal)
        inputs, known = inputs_of(view)
        if weight > 0:
            true_view = self.view(x0, x_t, t, r, second_eps, marginal)[0]
            inputs = torch.cat((inputs, inputs_of(true_view)[0]))
            known = {
                name: value if value is None else value.repeat(2, *[1] * (value.ndim - 1)) for name, value in known.items()
            }
        labels, embeds = known.get("class_labels"), known.get("image_embeds")
        levels = u.repeat(len(inputs) // len(u))
        output = predict_all(critic, inputs, levels, labels, image_embeds=embeds, forward=forward).float()
        own = path.to_x0(output[: len(x), :channels], view, u, self.prediction_type)
        gain = x0_per_prediction(self.prediction_type, *path.signal_and_noise(u, view))
        losses = {"critic_loss": ((own - drawn.detach()) / gain).square().flatten(1).mean(dim=1)}
        if weight > 0:
            drawn_logit, true_logit = output[:, channels:].mean(dim=(1, 2, 3)).chunk(2)
            losses["logit_loss"] = F.softplus(drawn_logit) + F.softplus(-true_logit)
        if teacher is None:
            return losses

        with torch.no_grad():
            given = Given(conditions.get("class_labels"), conditions.get("image_embeds"))
            prediction = guided_prediction(teacher, view, u, given, None, self.settings.guidance_scale, self.guide)
            true = path.to_x0(prediction.float(), view.detach(), u, self.prediction_type)
        teacher_loss = ((true - drawn.detach()) / gain).square().flatten(1).mean(dim=1)
        scale = (drawn.detach() - true).abs().flatten(1).mean(dim=1).clamp_min(SMALLEST).view(-1, 1, 1, 1)
        goal = drawn.detach() - (own.detach() - true) / scale
        if weight > 0:
            (slope,) = torch.autograd.grad(drawn_logit.sum(), drawn, retain_graph=True)
            size = self.mean_over_processes(slope.abs().mean()).clamp_min(SMALLEST**2)
            goal = goal + weight * torch.sigmoid(-drawn_logit.detach()).view(-1, 1, 1, 1) * slope / size
        # Gradients with respect to the prediction are of one size at every t.
        per_prediction = x0_per_prediction(self.prediction_type, *path.signal_and_noise(t, t)).abs()
        loss = 0.5 / per_prediction * (x - goal).square().flatten(1).mean(dim=1)
        return {"loss": loss, "teacher_loss": teacher_loss} | losses

    def view(
        self,
        x: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        r: torch.Tensor,
        second_eps: torch.Tensor,
        marginal: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise x again and join it with x_t to (x_u, u); for marginal views, return the noised x alone, (x_r, r)."""
        x_r = self.path.noise(x, second_eps, r)
        if self.settings.views == "marginal":
            return x_r, r
        view, u = joined_view(self.path, x_t, t, x_r, r)
        return torch.where(marginal.view(-1, 1, 1, 1), x_r, view), torch.where(marginal, r.to(u.dtype), u)

    def is_marginal(self, t: torch.Tensor, simulated: torch.Tensor | None = None) -> torch.Tensor:
        """Return for which images, (B,), draws are compared without x_t: those with much noise, and ``simulated``."""
        noisy = self.is_noisy(t)
        return noisy if simulated is None else noisy | simulated

    def is_noisy(self, t: torch.Tensor) -> torch.Tensor:
        """Return where the noise level is above ``marginal_above``, (B,)."""
        signal, noise = self.path.signal_and_noise(t, t)
        above = self.settings.marginal_above
        return noise > (math.inf if above is None else above) * signal

    def critic_inputs(
        self,
        critic: ModelMixin,
        view: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        conditions: Conditions,
        marginal: torch.Tensor,
    ) -> tuple[torch.Tensor, Conditions]:
        """Return the sample and the conditions that the critic gets for a view. It does not see the x_t of marginal views, nor
        the t of noisy ones."""
        if self.settings.views != "conditional":
            return view, conditions
        x_t = torch.where(marginal.view(-1, 1, 1, 1), 0.0, x_t)
        return with_first_view(critic, view, x_t, torch.where(self.is_noisy(t), self.path.last, t), conditions)


def critic_objective(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """Combine the losses that the critic is trained with."""
    logit = losses.get("logit_loss")
    return losses["critic_loss"] if logit is None else losses["critic_loss"] + LOGIT_WEIGHT * logit
