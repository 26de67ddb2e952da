"""Adversarial few-step methods: DMD2 (arXiv 2405.14867) and denoising diffusion GANs (2112.07804)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .method import Method, column, squares
from .network import Critic, Denoiser, Start, denoiser, feature_head, levels, resample, trailing

MIN_TIME, MAX_TIME = 0.02, 0.98
"""Range of timesteps at which noise is added to generated images, as fractions of the last one."""
MIN_SCALE = 1e-4
"""Smallest normaliser of the gradient."""


class FakeScore(nn.Module):
    """DMD2's critic: a denoiser of generated images, with a classifier of real and generated images on its features."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.head = feature_head(denoiser)

    def forward(self, x_r: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x_0 and the logit of the classifier."""
        clean, features = self.denoiser.clean_and_features(x_r, sigma, labels)
        return clean, self.head(features)

    def logit(self, x_r: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the logit alone, without the work for x_0."""
        return self.head(self.denoiser.features(x_r, sigma, labels))


@dataclass
class DMD2Settings:
    learning_rate: float = 5e-5
    critic_rate: float = 5e-5
    critic_updates: int = 5
    gan: float = 3e-3
    """Weight of the classifier in the generator's loss."""
    critic_gan: float = 1e-2
    """Weight of the classifier in the critic's loss."""
    guidance: float = 1.0
    """Scale of the teacher's classifier-free guidance."""
    steps: int = 4
    """Number of noise levels that the generator is trained at."""
    first: float = 5.0
    """Sigma that the network is given in the first step. At the last sigma of the process, the initial model predicts a
    constant, and training does not get away from it (few_step/known.py). One-step SDXL of DMD2 uses a middle timestep for the
    same reason."""


class DMD2(Method):
    """DMD2. Noise is added to the generator's output x, which gives x_r. The frozen Gaussian model has the score of real x_r,
    and the critic that of generated x_r:

        goal = x - (D_critic(x_r) - D_teacher(x_r)) / mean |x - D_teacher(x_r)|,
        loss = |x - goal|^2 / 2 + gan softplus(-c(x_r))

    The generator's inputs are its own samples from earlier steps, as in sampling. The number of the step is drawn at random.
    Each update is one of the critic, and each ``critic_updates``-th one also of the generator."""

    Settings = DMD2Settings
    SEARCH = {
        "learning_rate": [2e-5, 5e-5, 1e-4, 3e-4],
        "critic_rate": [5e-5, 1e-4, 3e-4],
        "critic_updates": [1, 2, 5],
        "gan": [0.0, 3e-3, 3e-2],
        "guidance": [1.0, 1.5],
        "first": [2.0, 5.0, 80.0],
        "steps": [2, 4, 8],
    }

    def __init__(self, start: Start, settings: DMD2Settings) -> None:
        super().__init__(start, settings)
        model, critic = denoiser(start), FakeScore(denoiser(start))
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self.cycle = settings.critic_updates * settings.steps
        self.sigmas = trailing(model, settings.steps).clamp_max(settings.first)
        for name, network, rate in (("model", model, settings.learning_rate), ("critic", critic, settings.critic_rate)):
            self.add(name, network, torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01, fused=True))
        self.last = torch.zeros((), device=start.device)

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        settings, options = self.settings, {"generator": generator, "device": x0.device}
        model, critic = self.networks["model"], self.networks["critic"]
        turn = int(torch.randint(settings.steps, ()))  # on the CPU, with its own generator
        trains = self.count % settings.critic_updates == 0
        x_t, sigma = self.inputs(x0.shape, labels, turn, generator)
        with torch.set_grad_enabled(trains):
            x = model.clean(x_t, sigma, labels)

        drawn = x.detach()
        time = torch.empty(len(x0), device=x0.device).uniform_(MIN_TIME, MAX_TIME, generator=generator)
        alphabar = self.start.alphas_cumprod[(time * len(self.start.alphas_cumprod)).long()]
        noise = (1 / alphabar - 1).sqrt()
        a, s = levels(noise)
        if trains:
            x_r = a * x + s * torch.randn(x0.shape, **options)
            with torch.no_grad():
                true = self.teacher.guided(x_r, noise, labels, settings.guidance)
            critic.requires_grad_(False)  # only gradients of its inputs are needed
            own, logit = critic(x_r, noise, labels)
            scale = (drawn - true).abs().flatten(1).mean(dim=1).clamp_min(MIN_SCALE)
            goal = drawn - (own.detach() - true) / column(scale)
            # Per element, because the paper's weight of the classifier is relative to that.
            loss = 0.5 * squares(x - goal).mean() / x[0].numel() + settings.gan * F.softplus(-logit).mean()
            self.descend("model", loss, rate)
            critic.requires_grad_(True)
            self.last = loss.detach()

        fake, fake_logit = critic(a * drawn + s * torch.randn(x0.shape, **options), noise, labels)
        error = (squares(fake - drawn) / noise.square() * (1 + noise.square())).mean() / x0[0].numel()  # the error of v
        loss = error
        if settings.critic_gan:
            real_logit = critic.logit(a * x0 + s * torch.randn(x0.shape, **options), noise, labels)
            loss = error + settings.critic_gan * (F.softplus(fake_logit).mean() + F.softplus(-real_logit).mean())
        self.descend("critic", loss, rate)
        return {"loss": self.last, "critic_loss": error.detach()}

    def inputs(
        self, shape: torch.Size, labels: torch.Tensor, turn: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x_t and sigma for step number ``turn`` of sampling, after the generator's own earlier steps."""
        model, sigmas = self.networks["model"], self.sigmas
        x = torch.randn(shape, generator=generator, device=labels.device)
        sigma = sigmas[turn].expand(len(labels))
        if turn:
            x = resample(lambda x, sigma: model.clean(x, sigma, labels), x, sigmas[:turn], generator)
            a, s = levels(sigma)
            x = a * x + s * torch.randn(shape, generator=generator, device=labels.device)
        return x, sigma

    def sample(
        self,
        network: nn.Module,
        noise: torch.Tensor,
        labels: torch.Tensor,
        steps: int,
        generator: torch.Generator,
        first: float | None = None,
    ) -> torch.Tensor:
        sigmas = trained_levels(network, steps, self.settings.steps, first).clamp_max(self.settings.first)
        return resample(lambda x, sigma: network.clean(x, sigma, labels), noise, sigmas, generator)


@dataclass
class DDGANSettings:
    learning_rate: float = 1.6e-4
    critic_rate: float = 1.25e-4
    steps: int = 4
    r1: float = 0.02
    """Weight gamma of the R1 penalty."""
    every: int = 15
    """Steps between two R1 penalties."""


class DDGAN(Method):
    """Denoising diffusion GAN. The generator maps x_t and noise z to x_0, which gives x_s by the posterior q(x_s | x_t, x_0).
    The critic's input is (x_s, x_t, t), real or generated:

        L_critic = softplus(-c(real)) + softplus(c(generated)) + gamma / 2 |dc / dx_s|^2,    L = softplus(-c(generated))
    """

    Settings = DDGANSettings
    SEARCH = {
        "learning_rate": [2e-5, 5e-5, 1.6e-4, 5e-4],
        "critic_rate": [5e-5, 1.25e-4, 5e-4],
        "steps": [2, 4, 8],
        "r1": [0.02, 0.05, 0.5, 2.0],
    }

    def __init__(self, start: Start, settings: DDGANSettings) -> None:
        super().__init__(start, settings)
        model = denoiser(start, more_channels=start.channels)
        critic = Critic(denoiser(start, second=True, more_channels=start.channels))
        self.cycle = settings.every
        for name, network, rate in (("model", model, settings.learning_rate), ("critic", critic, settings.critic_rate)):
            self.add(name, network, torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.9), fused=True))
        self.sigmas = torch.cat((trailing(model, settings.steps), torch.zeros(1, device=start.device)))

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        settings, options = self.settings, {"generator": generator, "device": x0.device}
        model, critic = self.networks["model"], self.networks["critic"]
        turn = torch.randint(settings.steps, (len(x0),), **options)
        t, s = self.sigmas[turn], self.sigmas[turn + 1]
        (a_t, s_t), (a_s, s_s) = levels(t), levels(s)
        # A real pair: x_s, and x_t made from it.
        x_s = a_s * x0 + s_s * torch.randn(x0.shape, **options)
        kept = a_t / a_s
        x_t = kept * x_s + (s_t**2 - (kept * s_s) ** 2).clamp_min(0).sqrt() * torch.randn(x0.shape, **options)

        drawn = posterior_step(model, x_t, t, s, labels, generator)
        penalised = self.count % settings.every == 0
        with sdpa_kernel(SDPBackend.MATH if penalised else list(BACKENDS)):  # fused attention has no second derivative
            real = x_s.detach().requires_grad_(penalised)
            logit = self.logit(critic, real, x_t, t, s, labels)
            critic_loss = F.softplus(-logit).mean() + F.softplus(self.logit(critic, drawn.detach(), x_t, t, s, labels)).mean()
            loss = critic_loss
            if penalised:
                [gradient] = torch.autograd.grad(logit.sum(), real, create_graph=True)
                loss = loss + 0.5 * settings.r1 * squares(gradient).mean()
            self.descend("critic", loss, rate)
        model_loss = F.softplus(-self.logit(critic, drawn, x_t, t, s, labels)).mean()
        self.descend("model", model_loss, rate)
        return {"loss": model_loss.detach(), "critic_loss": critic_loss.detach()}

    def logit(
        self, critic: nn.Module, x_s: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        return critic(torch.cat((x_s, x_t), dim=1), s.clamp_min(1e-3), labels, t / (1 + t))

    @torch.no_grad()
    def sample(
        self,
        network: nn.Module,
        noise: torch.Tensor,
        labels: torch.Tensor,
        steps: int,
        generator: torch.Generator,
        first: float | None = None,
    ) -> torch.Tensor:
        sigmas = trained_levels(network, steps, self.settings.steps, first)
        x = noise
        for t, s in zip(sigmas, torch.cat((sigmas[1:], torch.zeros_like(sigmas[:1])))):
            x = posterior_step(network, x, t.expand(len(x)), s.expand(len(x)), labels, generator)
        return x


def trained_levels(network: Denoiser, steps: int, trained: int, first: float | None) -> torch.Tensor:
    """Return the sigmas of at most ``steps`` steps of a method that is trained at ``trained`` levels only, largest first.

    Other levels would give the network inputs that it does not know, so more steps are not taken. With ``first``, the sigma of
    a draft: that, and the levels clearly below it.
    """
    if first is None:
        return trailing(network, min(steps, trained))
    known = trailing(network, trained)
    below = known[known < 0.9 * first][: steps - 1]
    return torch.cat((torch.full_like(known[:1], first), below))


BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def posterior_step(
    model: Denoiser,
    x_t: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    labels: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw from q(x_s | x_t, x_0) with x_0 = G(x_t, z). With b = a_t / a_s and v = s_t^2 - b^2 s_s^2,

    x_s = (b s_s^2 x_t + a_s v x_0 + s_s sqrt(v) s_t eps) / s_t^2
    """
    options = {"generator": generator, "device": x_t.device}
    x0 = model.clean(torch.cat((x_t, torch.randn(x_t.shape, **options)), dim=1), t, labels)
    (a_t, s_t), (a_s, s_s) = levels(t), levels(s)
    kept = a_t / a_s
    variance = (s_t**2 - (kept * s_s) ** 2).clamp_min(0)
    noise = torch.randn(x_t.shape, **options)
    return (kept * s_s**2 * x_t + a_s * variance * x0 + s_s * variance.sqrt() * s_t * noise) / s_t**2
