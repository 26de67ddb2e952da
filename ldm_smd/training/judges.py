"""The networks that judge a mixture's draws in a distillation: the teacher, and a critic that starts as it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding

from ..diffusion.process import GaussianPath, x0_per_prediction
from ..diffusion.settings import DistillationConfig
from ..diffusion.two_views import joined_view
from ..models.extended_dit import without_label_dropout
from ..models.unet import SMDUNet2DModel
from ..schema import check

TIME_FEATURES = 128
SMALLEST = 1e-4
LOGIT_WEIGHT = 0.1
"""Of the logit's loss beside the denoiser's, in the critic's objective."""
Conditions = dict[str, torch.Tensor | None]
Forward = Callable[..., tuple[torch.Tensor]]


@dataclass
class Judges:
    """Teacher and critic look at x_u, and say how the draws x of q(x_0 | x_t) are to change:

        goal = x - (D_critic(x_u, u) - D_teacher(x_u, u)) / mean |x - D_teacher(x_u, u)|,    loss = |x - goal|^2 / (2 s_t)

    What the critic cannot see it cannot miss, so it sees x_t beside x_u; else draws could be good images that x_t does not
    allow (docs/mixtures.md).

    With an adversarial weight w the critic also tells draws from true x_0 of the same x_t, by the mean of one more output
    channel, its logit c(x); the goal then has one term more, of about the same size in every training:

        + w sigmoid(-c) grad c / mean |grad c|

    This mean is over the images too, so ``over_processes`` takes it to the mean of all processes; with ``accumulate`` it is
    that of a part of the batch.
    """

    path: GaussianPath
    prediction_type: str
    settings: DistillationConfig
    over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda mean: mean

    def losses(
        self,
        teacher: Forward,
        critic: Forward,
        x: torch.Tensor,
        x0: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        r: torch.Tensor,
        second_eps: torch.Tensor,
        conditions: Conditions,
    ) -> dict[str, torch.Tensor]:
        """Return the mixture's loss, the critic's as a denoiser, the teacher's where the critic's is taken, and with an
        adversarial weight the logit's, each (B,). The critic learns by ``critic_objective`` of them.

        Args:
            teacher, critic: forward passes, the critic's of ``critic_of``.
            x: draws of the mixture for x_t, (B, C, h, w), with its graph.
            x0: what x_t is made of.
            r, second_eps: timesteps (B,) and noise of the second view.
        """
        path, weight, channels = self.path, self.settings.adversarial_weight, x.shape[1]
        drawn = x.detach().requires_grad_(weight > 0)
        view, u = self.view(drawn, x_t, t, r, second_eps)
        seen, known = self.seen(view, x_t, t, conditions)
        if weight > 0:
            true_view = self.view(x0, x_t, t, r, second_eps)[0]
            seen = torch.cat((seen, self.seen(true_view, x_t, t, conditions)[0]))
            known = {
                name: value if value is None else value.repeat(2, *[1] * (value.ndim - 1)) for name, value in known.items()
            }
        said = critic(seen, u.repeat(len(seen) // len(u)), return_dict=False, **known)[0].float()
        with torch.no_grad():
            prediction = teacher(view, u, return_dict=False, **conditions)[0][:, :channels].float()
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
        self, view: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor, Conditions]:
        return beside(view, x_t, t, conditions) if self.settings.views == "conditional" else (view, conditions)


def critic_objective(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a critic is trained by, of the losses that ``Judges`` returns."""
    logit = losses.get("logit_loss")
    return losses["critic_loss"] if logit is None else losses["critic_loss"] + LOGIT_WEIGHT * logit


def critic_of(teacher: ModelMixin, settings: DistillationConfig) -> ModelMixin:
    """A copy of the teacher that sees and says what ``Judges`` asks for; what is new starts at zero. Only an SMDUNet2DModel can
    be given more to see and to say."""
    sees_x_t, tells = settings.views == "conditional", settings.adversarial_weight > 0
    if not isinstance(teacher, SMDUNet2DModel):
        kind = type(teacher).__name__
        key = "objective.distillation"
        check(not isinstance(teacher, UNet2DConditionModel), f"{key}.teacher", "a denoiser without cross-attention", kind)
        check(not sees_x_t, f"{key}.views", f"joined or marginal for a {kind} as teacher", settings.views)
        check(not tells, f"{key}.adversarial_weight", f"0 for a {kind} as teacher", settings.adversarial_weight)
        return without_label_dropout(copy.deepcopy(teacher)).requires_grad_(True)
    critic = extended(teacher, teacher.config.in_channels if sees_x_t else 0, TIME_FEATURES if sees_x_t else 0, int(tells))
    return critic.requires_grad_(True)


def extended(teacher: SMDUNet2DModel, inputs: int, features: int, outputs: int) -> SMDUNet2DModel:
    """A copy of a Gaussian denoiser with so many more input channels, dimensions of its embedding, and output channels; all
    their weights are zero."""
    before = teacher.config.embedding_dimensions or 0
    dimensions = before + features
    channels = {name: teacher.config[name] + more for name, more in (("in_channels", inputs), ("out_channels", outputs))}
    copied = SMDUNet2DModel.from_config(teacher.config, **channels, embedding_dimensions=dimensions or None)
    weights = teacher.state_dict()
    weights["conv_in.weight"] = padded(weights["conv_in.weight"], inputs, dim=1)
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = padded(weights[name], outputs, dim=0)
    if copied.image_embedding is not None:
        embedding = weights.get("image_embedding.weight", copied.image_embedding.weight[:, :0])
        # Embeddings are scaled by the root of all their dimensions.
        weights["image_embedding.weight"] = padded(embedding * math.sqrt(before / dimensions), features, dim=1)
    copied.load_state_dict(weights)
    return copied.to(teacher.device)


def padded(weight: torch.Tensor, more: int, dim: int) -> torch.Tensor:
    """Append zeros along a dimension."""
    shape = list(weight.shape)
    shape[dim] = more
    return torch.cat((weight, weight.new_zeros(shape)), dim=dim)


def beside(sample: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> tuple[torch.Tensor, Conditions]:
    """Put x_t (B, C, h, w) beside a sample as more channels, and t (B,) beside the image embeddings."""
    features = get_timestep_embedding(t, TIME_FEATURES) / math.sqrt(TIME_FEATURES / 2)  # of length 1
    embeds = conditions.get("image_embeds")
    joined = features if embeds is None else torch.cat((embeds, features), dim=1)
    return torch.cat((sample, x_t), dim=1), {**conditions, "image_embeds": joined}
