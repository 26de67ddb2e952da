"""SMDScheduler: ancestral sampling with more, or less, fresh noise."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion.process import DiffusionProcess
from .timesteps import Generators


class SMDScheduler(DDPMScheduler):
    """Steps from x_t to x_s that keep a chosen part of the noise in x_t. With the draw x_0 of a mixture, z ~ N(0, I), the
    signal-to-noise ratios l = a^2 / s^2 and the stochasticity p,

        x_s = a_s x_0 + s_s (k eps + sqrt(1 - k^2) z),    eps = (x_t - a_t x_0) / s_t,    k = (l_t / l_s)^(p / 2).

    With p = 1 this is DDPMScheduler, x_s ~ q(x_s | x_t, x_0). p = 0 is DDIM. With very large p all noise is fresh, as in
    sampling from consistency models (arXiv 2303.01469) and DMD2 (2405.14867). The correlation k of the noise at t and s is the
    same however many steps are between, as in the family of reverse SDEs of DEIS (2204.13902) and SA-Solver (2309.05019).

    If x_0 is a true draw of q(x_0 | x_t), every p is exact, however long the steps. If the draws of a mixture exaggerate what
    x_t shows, as after distillation, the error adds up over many steps with p = 1, and less with larger p.

    Otherwise it is a DDPMScheduler: ``set_timesteps``, ``add_noise``, ``from_config`` with the config of any other scheduler.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type, timestep_spacing,
        steps_offset, clip_sample, clip_sample_range, rescale_betas_zero_snr: as in DDPMScheduler.
        stochasticity: p, 0 or more.
        stochastic_above: noise level sigma = s_t / a_t of x_t from which on p is the stochasticity; below, p = 1.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        rescale_betas_zero_snr: bool = False,
        stochasticity: float = 4.0,
        stochastic_above: float = 2.5,
    ) -> None:
        for name, value in (("stochasticity", stochasticity), ("stochastic_above", stochastic_above)):
            if not value >= 0.0:
                raise ValueError(f"{name}: expected 0 or more, found {value}")
        known = inspect.signature(DDPMScheduler).parameters
        super().__init__(**{name: value for name, value in self.config.items() if name in known})

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Step from x_t (B, C, H, W) to the next timestep of ``set_timesteps``. The last step returns x_0."""
        path, x_t = DiffusionProcess(self.alphas_cumprod.to(sample.device)), sample.float()
        t = torch.as_tensor(timestep, device=sample.device).reshape(1)
        previous = int(self.previous_timestep(timestep))
        x0 = path.to_x0(model_output.float(), x_t, t, self.config.prediction_type)
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        drawn = x0
        if previous >= 0:
            a_t, s_t = path.signal_and_noise(t, x_t)
            a_s, s_s = path.signal_and_noise(torch.full_like(t, previous), x_t)
            power = torch.where(s_t / a_t >= self.config.stochastic_above, self.config.stochasticity, 1.0)
            kept = (a_t * s_s / (s_t * a_s)) ** power
            fresh = randn_tensor(x_t.shape, generator, x_t.device, x_t.dtype)
            drawn = a_s * x0 + s_s * (kept * (x_t - a_t * x0) / s_t + (1.0 - kept**2).clamp_min(0.0).sqrt() * fresh)
        drawn = drawn.to(sample.dtype)
        if not return_dict:
            return drawn, x0
        return DDPMSchedulerOutput(prev_sample=drawn, pred_original_sample=x0)
