"""Soft mixture denoising, trained by posterior distillation or with the energy score.

Distillation is that of tools/train.py with objective.name=distillation. The energy score is distributional diffusion (arXiv
2502.02483) with the network of this package."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import nn

from ldm_smd.diffusion.backward_simulation import STEP_COUNTS, simulate_backward
from ldm_smd.diffusion.objectives import objective
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DistillationConfig
from ldm_smd.diffusion.two_views import draw_second_timesteps
from ldm_smd.models.fit import fit_posterior_noise
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.training.critics import make_critic
from ldm_smd.training.distillation import MOMENTUM
from ldm_smd.training.distillation_losses import DistillationLosses, critic_objective
from ldm_smd.training.fit_gaussian import LATENTS_PER_COMPONENT
from ldm_smd.training.trained import adamw

from .gaussian import run_scheduler
from .method import Method
from .network import Start

MODES = 256
RANK = 128
MIXTURE_SETTINGS = {"z_channels": 32, "identifier_channels": 32, "hypernetwork_width": 40, "placement": "up"}
"""Settings of the mixture, as in configs/train/emoji-smd.yaml."""
PATCHES = [0, 4, 2, 1]
FIRST_DRAWS, FIRST_BETA = 4, 0.5
ENERGY_DRAWS = 2


class Mixture(Method):
    """Base class: the network, its sampling, and the energy score."""

    scheduler = "DDPM"
    """Name in SCHEDULERS (gaussian.py)."""

    def __init__(self, start: Start, settings: Any) -> None:
        super().__init__(start, settings)
        self.process = DiffusionProcess(start.alphas_cumprod)
        self.model = mixture(start, fitted=settings.fitted)

    def velocity(
        self,
        network: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor,
        draws: int,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Predict v, (N * draws, C, h, w), with the draws for an image in consecutive rows."""
        eta = torch.randn(len(x_t) * draws, *x_t.shape[1:], generator=generator, device=x_t.device)
        return network(x_t, t, labels, eta=eta, return_dict=False)[0]

    def energy_step(
        self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float, draws: int, beta: float
    ) -> dict[str, torch.Tensor]:
        """Take a training step with the energy score of ``draws`` draws."""
        t = self.process.random_t(len(x0), generator=generator, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        found = self.velocity(self.model, self.process.noise(x0, eps, t), t, labels, draws, generator)
        loss = self.energy_score(found, x0, eps, t, beta).mean()
        self.descend("model", loss, rate)
        return {"loss": loss.detach()}

    def energy_score(
        self, velocities: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, beta: float
    ) -> torch.Tensor:
        """Return the energy score of velocities (N * draws, C, h, w) for each x_0, (N,)."""
        target = self.process.target(x0, eps, t, "v_prediction")
        return objective("energy", beta, 1.0, PATCHES)(rearrange(velocities, "(b m) ... -> b m ...", b=len(x0)), target)

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
        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.velocity(network, x, t, labels, 1, generator)

        return run_scheduler(self.scheduler, predict, noise, steps, generator, first)


def mixture(start: Start, fitted: bool) -> SMDUNet2DModel:
    """Build a mixture with the weights of the Gaussian model.

    Args:
        fitted: fit the noise to the latents; else it is white noise, as in the paper.
    """
    config = {name: value for name, value in start.unet.config.items() if not name.startswith("_")} | MIXTURE_SETTINGS
    rank = min(RANK, start.channels * config["sample_size"] ** 2)
    config |= {"noise_rank": rank if fitted else 0, "noise_modes": 1, "noise_timesteps": len(start.alphas_cumprod)}
    if fitted:
        if start.latents is None or start.labels is None:
            raise ValueError("fitted: expected a start with latents, found none")
        config["noise_modes"] = max(1, min(MODES, len(start.latents) // LATENTS_PER_COMPONENT))
    network = SMDUNet2DModel(**config).to(start.device)
    assert network.mixture is not None
    if fitted:
        null = config["num_classes"]
        labels = torch.where(start.labels == null, -1, start.labels)
        process = DiffusionProcess(start.alphas_cumprod.cpu())
        noise = network.mixture.noise.cpu()
        fit_posterior_noise(noise, start.latents.cpu(), labels.cpu(), process, "v_prediction")
        network.mixture.noise.to(start.device)
    missing, unexpected = network.load_state_dict(start.unet.state_dict(), strict=False)
    if unexpected or any(not name.startswith("mixture.") for name in missing):
        raise ValueError(f"weights: expected those of the Gaussian model, found {missing + unexpected} missing or unknown")
    return network.train().requires_grad_(True)


@dataclass
class EnergySettings:
    learning_rate: float = 5e-4
    fitted: bool = True
    """Whether noise is fitted to the latents. Otherwise it is white, as in the paper."""
    draws: int = 4
    beta: float = 1.0


class Energy(Mixture):
    """Training with the energy score over patches: 1/M sum |v - v_j|^beta - 1/(2 M (M - 1)) sum |v_j - v_k|^beta."""

    Settings = EnergySettings
    SEARCH = {
        "learning_rate": [2e-4, 5e-4, 1e-3],
        "draws": [2, 4, 8],
        "beta": [0.5, 1.0, 1.5],
        "fitted": [True, False],
    }

    def __init__(self, start: Start, settings: EnergySettings) -> None:
        super().__init__(start, settings)
        self.add("model", self.model, adamw(self.model, settings.learning_rate, 0.01))

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        return self.energy_step(x0, labels, generator, rate, self.settings.draws, self.settings.beta)


@dataclass
class DistillationSettings:
    learning_rate: float = 5e-4
    distillation_rate: float = 0.0
    """Learning rate of the mixture after ``energy_first``; 0: the same."""
    critic_rate: float = 5e-4
    fitted: bool = False
    views: str = "conditional"
    marginal_above: float = 0.0
    """Noise level sigma of x_t above which the views are marginal. 0: nowhere."""
    pure_noise: float = 0.3
    timestep_shift: float = 1.0
    """Above 1: more of the distillation at high noise, as timestep_shift of tools/train.py."""
    second_view_shift: float = 1.0
    backward_simulation: float = 0.0
    """Fraction of the images whose x_t comes from the mixture's own sampling."""
    critic_updates: int = 1
    guidance: float = 1.0
    """Scale of the teacher's classifier-free guidance."""
    adversarial: float = 0.0
    energy_weight: float = 0.0
    """Weight of the energy score of ENERGY_DRAWS draws, in addition."""
    energy_first: float = 0.0
    """Fraction of the images, at the start, that are used for training with the energy score (FIRST_DRAWS draws, exponent
    FIRST_BETA)."""
    scheduler: str = "DDPM"
    """Name in SCHEDULERS (gaussian.py)."""
    separate_schedules: bool = False
    """Whether the learning rate warms up and cools down in each of the two parts by itself."""


class PosteriorDistillation(Mixture):
    """NCVSD (arXiv 2506.09416) for a mixture, with the losses of the package (ldm_smd/training/distillation_losses.py)."""

    Settings = DistillationSettings
    SEARCH = {
        "learning_rate": [5e-4, 1e-3],
        "fitted": [True, False],
        "views": ["conditional", "joined", "marginal"],
        "adversarial": [0.0, 0.3, 0.1, 1.0],
        "critic_updates": [1, 2],
        "critic_rate": [5e-4, 1e-3, 2e-4],
        "pure_noise": [0.3, 0.1, 0.5],
        "energy_first": [0.0, 0.67],
    }

    def __init__(self, start: Start, settings: DistillationSettings) -> None:
        super().__init__(start, settings)
        about = DistillationConfig(
            views=settings.views,
            adversarial_weight=settings.adversarial,
            marginal_above=settings.marginal_above or None,
            guidance_scale=settings.guidance,
        )
        self.scheduler = settings.scheduler
        self.teacher = copy.deepcopy(start.unet).eval().requires_grad_(False)
        self.critic = make_critic(self.teacher, about).train()
        self.distillation_losses = DistillationLosses(self.process, "v_prediction", about)
        self.add("model", self.model, adamw(self.model, settings.learning_rate, 0.01, MOMENTUM))
        self.add("critic", self.critic, adamw(self.critic, settings.critic_rate, momentum=MOMENTUM))

    @property
    def first(self) -> float:
        """Fraction of the images, at the start, that another objective is trained on."""
        return self.settings.energy_first

    @property
    def parts(self) -> list[tuple[float, float]]:
        return [(0.0, self.first), (self.first, 1.0)] if 0 < self.first < 1 else super().parts

    @property
    def schedule(self) -> tuple[float, float]:
        if not self.settings.separate_schedules:
            return super().schedule
        return next(part for part in reversed(self.parts) if part[0] <= self.progress)

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        if self.progress < self.first:
            return self.first_step(x0, labels, generator, rate)
        own = self.settings.learning_rate
        for _ in range(self.settings.critic_updates - 1):
            self.descend("critic", critic_objective(self.losses(x0, labels, generator, False)).mean(), rate)
        losses = self.losses(x0, labels, generator, True)
        self.descend("model", losses["loss"].mean(), rate * (self.settings.distillation_rate or own) / own)
        self.descend("critic", critic_objective(losses).mean(), rate)
        return {name: value.detach().mean() for name, value in losses.items()}

    def first_step(
        self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float
    ) -> dict[str, torch.Tensor]:
        return self.energy_step(x0, labels, generator, rate, FIRST_DRAWS, FIRST_BETA)

    def losses(
        self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, model_learns: bool
    ) -> dict[str, torch.Tensor]:
        options, last = {"generator": generator, "device": x0.device}, self.process.last
        t = self.process.random_t(len(x0), self.settings.timestep_shift, **options)
        t = torch.where(torch.rand(len(x0), **options) < self.settings.pure_noise, last, t)
        eps, weight = torch.randn(x0.shape, **options), self.settings.energy_weight if model_learns else 0.0
        x_t, draws = self.process.noise(x0, eps, t), ENERGY_DRAWS if weight > 0 else 1
        count = round(self.settings.backward_simulation * len(x0))
        simulated = (torch.arange(len(x0), device=x0.device) < count) & (t < last)
        if count:
            own = self.simulated(t[:count], labels[:count], x0[:count].shape, generator)
            x_t = torch.where(simulated.view(-1, 1, 1, 1), torch.cat((own, x_t[count:])), x_t)
        with torch.set_grad_enabled(model_learns):
            velocities = self.velocity(self.model, x_t, t, labels, draws, generator)
            x = self.process.to_x0(velocities[::draws], x_t, t, "v_prediction")
        r = draw_second_timesteps(self.process, len(x0), self.settings.second_view_shift, generator)
        second = torch.randn(x0.shape, **options)
        networks, given = (self.teacher if model_learns else None, self.critic), {"class_labels": labels}
        losses = self.distillation_losses.losses(*networks, x, x0, x_t, t, r, second, given, simulated=simulated)
        if weight > 0:
            score = self.energy_score(velocities, x0, eps, t, 1.0) * ~self.distillation_losses.is_marginal(t, simulated)
            losses["loss"] = losses["loss"] + weight * score
        return losses

    @torch.no_grad()
    def simulated(self, t: torch.Tensor, labels: torch.Tensor, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Sample x_t, of ``shape``, with the mixture."""
        steps = STEP_COUNTS[int(torch.randint(len(STEP_COUNTS), ()))]  # on the CPU, with its own generator
        options = {"generator": generator, "device": t.device}
        first, etas, noises = (torch.randn((shape[0], *more, *shape[1:]), **options) for more in ((), (steps,), (steps,)))

        def draw(x: torch.Tensor, t: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
            return self.process.to_x0(self.model(x, t, labels, eta=eta, return_dict=False)[0], x, t, "v_prediction")

        return simulate_backward(draw, self.process, first, t, etas, noises, steps)


class WhiteNoiseDistillation(PosteriorDistillation):
    """The same with white noise, the default, under another name: a contest can then have both."""


@dataclass
class EnergyThenSettings(DistillationSettings):
    fitted: bool = True
    adversarial: float = 0.3
    pure_noise: float = 0.1
    critic_rate: float = 1e-3
    energy_first: float = 0.67


class EnergyThenDistillation(PosteriorDistillation):
    """The energy score for two thirds of the images, which take about half of the time, then distillation."""

    Settings = EnergyThenSettings


@dataclass
class FolderSettings:
    folder: str = ""


class Folder(Mixture):
    """A mixture that was trained elsewhere."""

    Settings = FolderSettings
    SEARCH: dict[str, list] = {}

    def __init__(self, start: Start, settings: FolderSettings) -> None:
        Method.__init__(self, start, settings)
        self.process = DiffusionProcess(start.alphas_cumprod)
        network = SMDUNet2DModel.from_pretrained(settings.folder, use_safetensors=True)
        self.networks["model"] = network.to(start.device)
