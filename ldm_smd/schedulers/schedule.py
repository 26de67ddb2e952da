"""The diffusion process of a training run, as the default scheduler of its pipeline."""

from __future__ import annotations

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

from ..diffusion.settings import DiffusionConfig

COSINE_MAX_BETA = 0.75


def build_scheduler(config: DiffusionConfig) -> SchedulerMixin:
    """Make the default scheduler of a process.

    For a noise schedule: ancestral sampling with the exact posterior variance, which samples a mixture exactly. For flow
    matching: Euler steps. "trailing" spacing starts few-step sampling at the noisiest timestep (arXiv 2305.08891).
    """
    if config.path == "flow":
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps)
    if config.beta_schedule == "cosine":
        betas = betas_for_alpha_bar(config.num_train_timesteps, max_beta=COSINE_MAX_BETA)
        noise = {"trained_betas": betas.tolist()}
    else:
        noise = {"beta_schedule": config.beta_schedule, "beta_start": config.beta_start, "beta_end": config.beta_end}
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        **noise,
        prediction_type=config.prediction_type,
        variance_type="fixed_small",
        timestep_spacing="trailing",
        clip_sample=False,
    )
