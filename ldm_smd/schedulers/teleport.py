"""TeleportScheduler: the first part of a sampling in closed form, the rest by any scheduler."""

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
from .timesteps import Generators


class TeleportScheduler(SchedulerMixin, ConfigMixin):
    """Analytical teleportation (arXiv 2412.09726): from pure noise to ``sigma_skip`` = s_t / a_t by the closed-form flow of a
    Gaussian (LatentGaussians), then any other scheduler with all its steps on what remains.

    ``start`` takes the noise to where ``timesteps`` begin; SMDPipeline with its ``gaussian`` part calls it. All else but
    ``config`` and the noise schedule is that of the other scheduler, ``rest``.

    Args:
        scheduler: class of diffusers, or GMSScheduler, that continues; with settings as make_scheduler takes them.
        sigma_skip: noise over signal to jump to; the nearest timestep below it.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type, rescale_betas_zero_snr: as in
            DDPMScheduler.
    """

    _compatibles = [known.name for known in KarrasDiffusionSchedulers]
    start_part = "gaussian"
    init_noise_sigma = 1.0  # what ``start`` returns needs no scaling

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
            raise ValueError(f"sigma_skip: expected at least the least of the schedule, {sigmas[0]:.3g}, found {sigma_skip}")
        # On a schedule that ends there, every scheduler spaces its steps by its own rule, in timesteps that the network knows.
        betas = self.betas[:kept].tolist()
        rest = {"num_train_timesteps": kept, "trained_betas": betas, "prediction_type": prediction_type}
        self.rest = scheduler_from(scheduler, rest, {"GMSScheduler": GMSScheduler})
        if is_flow(self.rest):
            raise ValueError(f"scheduler: expected one of a noise schedule to go on with, found {scheduler}")

    def __getattr__(self, name: str) -> Any:
        """Look everything else up in the scheduler that continues: timesteps, order, add_noise, step and its parameters, ..."""
        if name == "rest":  # not there yet
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
        """Unit noise (B, C, H, W), at the end of the full schedule -> the sample for the first of ``timesteps``, in units of
        the scheduler that continues. Labels are (B,) or None for no class; the generator chooses a mixture's components."""
        normal = randn_tensor((len(noise), 1), generator=generator, device=noise.device, dtype=torch.float32)
        uniform = torch.special.ndtr(normal).squeeze(1)
        # From the last t of the full schedule, whose x_t is all but pure noise.
        ends = [float(self.alphas_cumprod[index]) for index in (-1, round(float(self.timesteps[0])))]
        (a_t, s_t), (a_s, s_s) = ((alphabar**0.5, (1.0 - alphabar) ** 0.5) for alphabar in ends)
        x_s = gaussians.transport(noise, (a_t, s_t), (a_s, s_s), class_labels, uniform).to(noise.dtype)
        # add_noise says in which units a scheduler keeps its sample: a x_0 + s eps, or x_0 + (s / a) eps.
        return self.rest.add_noise(torch.zeros_like(x_s), x_s / s_s, self.timesteps[:1].repeat(len(x_s)))
