"""TeleportScheduler: the noisiest part of sampling in closed form, the rest by any scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from ..models.gaussian import LatentGaussians
from .conversion import is_flow
from .factory import scheduler_from
from .gms import GMSScheduler
from .smd import SMDScheduler
from .timesteps import Generators


class TeleportScheduler(SchedulerMixin, ConfigMixin):
    """Analytical teleportation (arXiv 2412.09726): jump from pure noise to ``sigma_skip`` = s_t / a_t with the closed-form flow
    of a Gaussian (LatentGaussians), then spend all steps of another scheduler on the remaining noise levels.

    ``start`` maps the noise to the first of ``timesteps``. SMDPipeline calls it if it has a ``gaussian`` component. Everything
    except ``config`` and the noise schedule is delegated to the other scheduler, ``rest``.

    Args:
        scheduler: class of diffusers, GMSScheduler or SMDScheduler, that takes the steps; with settings as in make_scheduler.
        sigma_skip: noise-to-signal ratio to jump to. The nearest timestep below it is taken.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type, rescale_betas_zero_snr: as in
            DDPMScheduler.
    """

    _compatibles = [known.name for known in KarrasDiffusionSchedulers]
    start_part = "gaussian"
    init_noise_sigma = 1.0  # ``start`` returns a scaled sample

    @register_to_config
    def __init__(
        self,
        scheduler: str = "UniPCMultistepScheduler",
        sigma_skip: float = 5.0,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        schedule = (num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        full = DDPMScheduler(*schedule, rescale_betas_zero_snr=rescale_betas_zero_snr)
        self.betas, self.alphas_cumprod = full.betas, full.alphas_cumprod
        sigmas = ((1.0 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        kept = int((sigmas <= sigma_skip).sum())
        if kept == 0:
            raise ValueError(f"sigma_skip: expected at least {sigmas[0]:.3g}, the smallest of the schedule, found {sigma_skip}")
        # The other scheduler gets a schedule that ends there, and spaces its steps on it by its own rule.
        betas = self.betas[:kept].tolist()
        rest = {"num_train_timesteps": kept, "trained_betas": betas, "prediction_type": prediction_type}
        self.rest = scheduler_from(scheduler, rest, {"GMSScheduler": GMSScheduler, "SMDScheduler": SMDScheduler})
        if is_flow(self.rest):
            raise ValueError(f"scheduler: expected one with a noise schedule to continue with, found {scheduler}")
        # Some schedulers cannot take predictions of x_0. The pipeline converts them to what this configuration says.
        self.register_to_config(prediction_type=self.rest.config.prediction_type)

    def __getattr__(self, name: str) -> Any:
        """Delegate to the other scheduler: timesteps, order, add_noise, step, ..."""
        if name == "rest":  # not set yet
            raise AttributeError(name)
        return getattr(self.rest, name)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def start(
        self,
        noise: torch.Tensor,
        gaussians: LatentGaussians,
        class_labels: torch.Tensor | None = None,
        generator: Generators = None,
    ) -> torch.Tensor:
        """Map unit noise (B, C, H, W) to the sample for the first of ``timesteps``, in the
        units of the other scheduler.

        Args:
            class_labels: (B,), or None for no class.
            generator: chooses the components if ``gaussians`` is a mixture.
        """
        normal = randn_tensor((len(noise), 1), generator=generator, device=noise.device, dtype=torch.float32)
        uniform = torch.special.ndtr(normal).squeeze(1)
        alphabar = float(self.alphas_cumprod[round(float(self.timesteps[0]))])
        a_s, s_s = alphabar**0.5, (1.0 - alphabar) ** 0.5
        # From pure noise, because ``noise`` has no signal, even if the schedule ends with some.
        x_s = gaussians.transport(noise, (0.0, 1.0), (a_s, s_s), class_labels, uniform).to(noise.dtype)
        # add_noise applies the units of the scheduler's samples: a x_0 + s eps, or x_0 + (s / a) eps.
        return self.rest.add_noise(torch.zeros_like(x_s), x_s / s_s, self.timesteps[:1].repeat(len(x_s)))
