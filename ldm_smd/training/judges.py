"""What the two networks that judge a mixture's draws in a distillation, the teacher and the critic, say of them."""

from __future__ import annotations

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
from .critics import Conditions, beside

SMALLEST = 1e-4
LOGIT_WEIGHT = 0.1
"""Of the logit's loss beside the denoiser's, in the critic's objective."""


@dataclass
class Judges:
    """Teacher and critic look at x_u, and say how the draws x of q(x_0 | x_t) are to change:

        goal = x - (D_critic(x_u, u) - D_teacher(x_u, u)) / mean |x - D_teacher(x_u, u)|,    loss = |x - goal|^2 / (2 s_t)

    What the critic cannot see it cannot miss, so it sees x_t beside x_u; else draws could be good images that x_t does not
    allow (docs/mixtures.md). With a ``guidance_scale`` the teacher is the guided one, and the mixture learns its samples.

    With an adversarial weight w the critic also tells draws from true x_0 of the same x_t, by the mean of one more output
    channel, its logit c(x); the goal then has one term more, of about the same size in every training:

        + w sigmoid(-c) grad c / mean |grad c|

    This mean is over the images too, so ``over_processes`` takes it to the mean of all processes; with ``micro_batches`` it is
    that of a part of the batch.
    """

    path: GaussianPath
    prediction_type: str
    settings: DistillationConfig
    over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda mean: mean

    def losses(
        self,
        teacher: ModelMixin,
        critic: ModelMixin,
        x: torch.Tensor,
        x0: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        r: torch.Tensor,
        second_eps: torch.Tensor,
        conditions: Conditions,
        forward: nn.Module | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the mixture's loss, the critic's as a denoiser, the teacher's where the critic's is taken, and with an
        adversarial weight the logit's, each (B,). The critic learns by ``critic_objective`` of them.

        Args:
            teacher, critic: any denoisers, the critic that of ``critic_of``.
            x: draws of the mixture for x_t, (B, C, h, w), with its graph.
            x0: what x_t is made of.
            r, second_eps: timesteps (B,) and noise of the second view.
            forward: what DDP, FSDP and torch.compile make of the critic, if they do.
        """
        path, weight, channels = self.path, self.settings.adversarial_weight, x.shape[1]
        drawn = x.detach().requires_grad_(weight > 0)
        view, u = self.view(drawn, x_t, t, r, second_eps)
        see = partial(self.seen, critic, x_t=x_t, t=t, conditions=conditions)
        seen, known = see(view)
        if weight > 0:
            true_view = self.view(x0, x_t, t, r, second_eps)[0]
            seen = torch.cat((seen, see(true_view)[0]))
            known = {
                name: value if value is None else value.repeat(2, *[1] * (value.ndim - 1)) for name, value in known.items()
            }
        labels, embeds = known.get("class_labels"), known.get("image_embeds")
        levels = u.repeat(len(seen) // len(u))
        said = predict_all(critic, seen, levels, labels, image_embeds=embeds, forward=forward).float()
        with torch.no_grad():
            given = Given(conditions.get("class_labels"), conditions.get("image_embeds"))
            prediction = guided_prediction(teacher, view, u, given, None, self.settings.guidance_scale).float()
            true = path.to_x0(prediction, view.detach(), u, self.prediction_type)
        own = path.to_x0(said[: len(x), :channels], view, u, self.prediction_type)

        scale = (drawn.detach() - true).abs().flatten(1).mean(dim=1).clamp_min(SMALLEST).view(-1, 1, 1, 1)
        goal = drawn.detach() - (own.detach() - true) / scale
        gain = x0_per_prediction(self.prediction_type, *path.signal_and_noise(u, view))
        adversarial: dict[str, torch.Tensor] = {}
        critic_loss, teacher_loss = (((found - drawn.detach()) / gain).square().flatten(1).mean(dim=1) for found in (own, true))
        if weight > 0:
            drawn_logit, true_logit = said[:, channels:].mean(dim=(1, 2, 3)).chunk(2)
            (slope,) = torch.autograd.grad(drawn_logit.sum(), drawn, retain_graph=True)
            size = self.over_processes(slope.abs().mean()).clamp_min(SMALLEST**2)
            goal = goal + weight * torch.sigmoid(-drawn_logit.detach()).view(-1, 1, 1, 1) * slope / size
            adversarial = {"logit_loss": F.softplus(drawn_logit) + F.softplus(-true_logit)}
        # An error of v is one of x_0 over s_t.
        loss = 0.5 / path.signal_and_noise(t, t)[1] * (x - goal).square().flatten(1).mean(dim=1)
        return {"loss": loss, "critic_loss": critic_loss, "teacher_loss": teacher_loss} | adversarial

    def view(
        self, x: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, second_eps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x noised anew and joined with x_t, (x_u, u); or alone, (x_r, r), where the views are marginal."""
        x_r = self.path.noise(x, second_eps, r)
        return (x_r, r) if self.settings.views == "marginal" else joined_view(self.path, x_t, t, x_r, r)

    def seen(
        self, critic: ModelMixin, view: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor, Conditions]:
        return beside(critic, view, x_t, t, conditions) if self.settings.views == "conditional" else (view, conditions)


def critic_objective(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a critic is trained by, of the losses that ``Judges`` returns."""
    logit = losses.get("logit_loss")
    return losses["critic_loss"] if logit is None else losses["critic_loss"] + LOGIT_WEIGHT * logit
