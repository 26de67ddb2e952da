"""Losses of the mixture and the critic in posterior distillation, and the critic's inputs."""

import pytest
import torch

from ldm_smd.diffusion.process import DiffusionProcess, RectifiedFlow
from ldm_smd.diffusion.settings import DistillationConfig
from ldm_smd.models.denoiser import predict_all
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.training import distillation_losses
from ldm_smd.training.critics import make_critic, with_first_view
from ldm_smd.training.distillation_losses import LOGIT_WEIGHT, DistillationLosses, critic_objective
from tests.diffusion.paths import KINDS, PROCESS
from tests.rounding import nearly_equal
from tests.tiny import SIZES, diffusers_unet

SINGLE_PRECISION = DiffusionProcess(PROCESS.alphas_cumprod.float())


@pytest.mark.parametrize("kind", KINDS)
def test_every_timestep_has_gradients_of_one_size(monkeypatch, kind):
    """Gradients with respect to the prediction, for a small error of it."""
    path = RectifiedFlow(1000) if kind == "flow_prediction" else SINGLE_PRECISION
    monkeypatch.setattr(distillation_losses, "predict_all", lambda network, x, *rest, **options: 0.1 * x)
    monkeypatch.setattr(distillation_losses, "guided_prediction", lambda network, x, *rest, **options: 0.2 * x)
    losses = DistillationLosses(path, kind, DistillationConfig(views="joined"))
    x0, eps, second_eps = torch.randn(3, 64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = []
    for t in (torch.full((64,), t) for t in (100, 500, 900)):
        x_t, r = path.noise(x0, eps, t), torch.full((64,), 500)
        prediction = path.target(x0, eps, t, kind).requires_grad_()
        x = path.to_x0(prediction, x_t, t, kind)
        losses.losses(object(), None, x, x0, x_t, t, r, second_eps, {})["loss"].sum().backward()
        sizes.append(float(prediction.grad.norm()))
    assert max(sizes) < 1.2 * min(sizes)


def test_the_losses_compute_their_formulas():
    """With linear denoisers, for views of the draw alone. The logit is proportional to the mean of the first channel."""
    path = SINGLE_PRECISION
    losses = DistillationLosses(path, "v_prediction", DistillationConfig(views="marginal", adversarial_weight=0.3))
    x, x0, x_t, eps = torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    t, r = torch.tensor([100, 500, 900]), torch.tensor([300, 50, 800])

    def denoiser(v, logit):
        return lambda view, *_, **__: (torch.cat((v * view, logit * view[:, :1]), dim=1),)

    draws = x.clone().requires_grad_()
    found = losses.losses(denoiser(0.2, 0.0), denoiser(-0.4, 2.0), draws, x0, x_t, t, r, eps, {})
    (gradient,) = torch.autograd.grad(found["loss"].sum(), draws)

    (a, s), s_t = path.signal_and_noise(r, x), path.signal_and_noise(t, x)[1]
    view, view_of_data = a * x + s * eps, a * x0 + s * eps
    true, own = (a * view - s * v * view for v in (0.2, -0.4))
    logit, logit_of_data = (2.0 * each[:, 0].mean(dim=(1, 2)) for each in (view, view_of_data))
    slope = torch.zeros_like(x)
    slope[:, 0] = 2.0 / 16 * a[:, 0]
    goal = x - (own - true) / (x - true).abs().mean(dim=(1, 2, 3), keepdim=True)
    goal = goal + 0.3 * torch.sigmoid(-logit).view(3, 1, 1, 1) * slope / slope.mean()
    expected = {
        "loss": (x - goal).square().mean(dim=(1, 2, 3)) / (2 * s_t.flatten()),
        "critic_loss": ((own - x) / s).square().mean(dim=(1, 2, 3)),
        "teacher_loss": ((true - x) / s).square().mean(dim=(1, 2, 3)),
        "logit_loss": (1 + logit.exp()).log() + (1 + (-logit_of_data).exp()).log(),
    }
    assert found.keys() == expected.keys()
    assert all(nearly_equal(found[name].detach(), value) for name, value in expected.items())
    assert nearly_equal(gradient, (x - goal) / (32 * s_t)), "the draws move to the goal"
    alone = losses.losses(None, denoiser(-0.4, 2.0), x, x0, x_t, t, r, eps, {})
    assert alone.keys() == {"critic_loss", "logit_loss"} and all(torch.equal(alone[name], found[name]) for name in alone)
    together = critic_objective(found).detach()
    assert nearly_equal(together, expected["critic_loss"] + LOGIT_WEIGHT * expected["logit_loss"])


@pytest.mark.parametrize("plain", [False, True])
def test_the_critic_gets_the_timestep_of_x_t(plain):
    critic = diffusers_unet() if plain else SMDUNet2DModel(8, 4, 4, **SIZES)
    x, t = torch.zeros(3, 4, 8, 8), torch.tensor([100, 100, 900])
    inputs, known = with_first_view(critic, x, x, t, {"class_labels": None})
    features = inputs[:, 8:].flatten(1) if plain else known["image_embeds"]
    assert torch.equal(features[0], features[1]) and (features[0] - features[2]).norm() > 0.5


def test_a_critic_starts_as_a_teacher_that_is_conditioned_on_embeddings():
    """Although its embeddings have more dimensions, by whose number the network scales them."""
    torch.manual_seed(0)
    teacher = SMDUNet2DModel(8, 4, 4, num_classes=3, embedding_dimensions=16, **{**SIZES, "z_channels": 0}).eval()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    critic = make_critic(teacher, DistillationConfig(adversarial_weight=0.3))
    x, x_t, t, labels = *torch.randn(2, 2, 4, 8, 8), torch.tensor([100, 900]), torch.tensor([0, 2])
    embeds = torch.nn.functional.normalize(torch.randn(2, 16))
    inputs, known = with_first_view(critic, x, x_t, t, {"class_labels": labels, "image_embeds": embeds})
    with torch.no_grad():
        wanted = predict_all(teacher, x, t, labels, image_embeds=embeds)
        found = predict_all(critic, inputs, t, labels, image_embeds=known["image_embeds"])
    assert nearly_equal(found[:, :4], wanted) and not found[:, 4:].any()
