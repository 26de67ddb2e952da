"""The baseline: the same budget is spent on more training of the Gaussian model, sampled with a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.pipelines.guidance import Conditions, guided_prediction
from ldm_smd.schedulers import make_scheduler
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.schedulers.teleport import TeleportScheduler
from ldm_smd.schedulers.timesteps import begin_run, step_options
from ldm_smd.training.trained import adamw

from .method import Method
from .network import Start, denoiser

SCHEDULERS = {
    "DDPM": "DDPMScheduler",
    "SMD": "SMDScheduler",
    "DDIM": "DDIMScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "SDE-DPM-Solver++": "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++",
}


@dataclass
class GaussianSettings:
    learning_rate: float = 3e-4
    scheduler: str = "UniPC"
    """A name in SCHEDULERS."""
    guidance: float = 1.0
    """Scale of classifier-free guidance in sampling. A step then takes two evaluations."""


class Gaussian(Method):
    """Training with the denoising loss |v(x_t, t) - (a eps - s x_0)|^2 at uniform t, as for the initial model."""

    Settings = GaussianSettings
    SEARCH = {
        "learning_rate": [1e-4, 3e-4, 6e-4, 1e-3],
        "scheduler": list(SCHEDULERS),
    }

    def __init__(self, start: Start, settings: GaussianSettings) -> None:
        super().__init__(start, settings)
        network = denoiser(start)
        self.process = DiffusionProcess(start.alphas_cumprod)
        self.evaluations = 1 if settings.guidance == 1.0 else 2
        self.add("model", network, adamw(network, settings.learning_rate))

    def step(self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float) -> dict[str, torch.Tensor]:
        t = self.process.random_t(len(x0), generator=generator, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        target = self.process.target(x0, eps, t, "v_prediction")
        found = self.networks["model"].unet(self.process.noise(x0, eps, t), t, labels, return_dict=False)[0]
        loss = (found - target).square().mean()
        self.descend("model", loss, rate)
        return {"loss": loss.detach()}

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
            return guided_prediction(network.unet, x, t, Conditions(labels), None, self.settings.guidance)

        return run_scheduler(self.settings.scheduler, predict, noise, steps // self.evaluations, generator, first)


@dataclass
class GuidedSettings(GaussianSettings):
    guidance: float = 1.5


class GuidedGaussian(Gaussian):
    """The same with guidance, under another name: a contest can then have both."""

    Settings = GuidedSettings


def run_scheduler(
    name: str,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    steps: int,
    generator: torch.Generator,
    first: float | None = None,
) -> torch.Tensor:
    """Sample x_0 with a scheduler.

    Args:
        name: name in SCHEDULERS.
        predict: (x_t, t) -> v.
        first: largest sigma of the schedule, as in TeleportScheduler. ``noise`` is then x_t at this sigma.
    """
    scheduler = make_scheduler(SCHEDULERS[name], build_scheduler(DiffusionConfig()))
    if first is not None:
        scheduler = TeleportScheduler.from_config(scheduler.config, scheduler=SCHEDULERS[name], sigma_skip=first).rest
    timesteps = begin_run(scheduler, steps, None)
    x = noise * scheduler.init_noise_sigma
    if first is not None:  # in the scheduler's units
        s = (1.0 - scheduler.alphas_cumprod[-1].item()) ** 0.5
        x = scheduler.add_noise(torch.zeros_like(noise), noise / s, timesteps[:1].repeat(len(noise)))
    for index, t in enumerate(timesteps):
        v = predict(scheduler.scale_model_input(x, t), t.to(x.device))
        x = scheduler.step(v, t, x, **step_options(scheduler, generator, index)).prev_sample
    return x
