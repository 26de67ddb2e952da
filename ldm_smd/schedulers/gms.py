"""GMSScheduler: ancestral sampling whose reverse kernel is a mixture of two Gaussians."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..deprecation import accept_former_names, current_arguments
from ..diffusion.central_moments import WEIGHT, CentralMoments, reverse_moments, two_gaussians, x0_moments
from ..diffusion.process import DiffusionProcess
from .kernel_fit import fit_two_gaussians
from .timesteps import Generators


class GMSScheduler(DDPMScheduler):
    """Gaussian mixture solver (arXiv 2311.00941): x_s ~ 1/3 N(m_1, var) + 2/3 N(m_2, var), elementwise, with the mean, the
    variance and the third central moment of q(x_s | x_t). The paper fits the kernel with 70 optimizer iterations per step; here
    it is solved in closed form (diffusion/central_moments.py) unless ``fit_iterations`` is set.

    Otherwise it is a DDPMScheduler: ``set_timesteps``, ``add_noise``, ``from_config`` with the config of any other scheduler.
    ``step`` expects two moments in extra channels of ``model_output``, as DDPMScheduler does for a learned variance.
    MomentHeads.predict returns them; SMDPipeline passes them on if it has a ``moments`` component.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type, timestep_spacing,
        steps_offset, clip_sample, clip_sample_range, rescale_betas_zero_snr: as in DDPMScheduler.
        num_moments: 3, or 2 for a single Gaussian with the variance of q(x_s | x_t), as in Extended Analytic-DPM (arXiv
            2206.07309).
        choose_per_image: choose one component per image; by default, one per element.
        within_component_fraction: fraction of the variance due to x_0 that stays within the components at least; the rest may
            lie between them. So each component has at least the variance v + fraction * (Var(x_s | x_t) - v), where v is the
            variance of q(x_s | x_t, x_0). The paper's floor is v / 10, below the normal term of variance v that x_s given x_t
            contains; with it the kernel is worse than one Gaussian (tests/schedulers/test_gms.py).
        fit_iterations: 0 to solve for the kernel; otherwise the number of iterations of the paper's fit, for comparison.
    """

    step_part = "moments"
    RENAMED = {"picture_draws": "choose_per_image", "inside_share": "within_component_fraction"}

    @accept_former_names(RENAMED)
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
        num_moments: int = 3,
        choose_per_image: bool = False,
        within_component_fraction: float = 0.2,
        fit_iterations: int = 0,
    ) -> None:
        if num_moments not in (2, 3):
            raise ValueError(f"num_moments: expected 2 or 3, found {num_moments}")
        if not 0.0 <= within_component_fraction <= 1.0:
            raise ValueError(f"within_component_fraction: expected 0 to 1, found {within_component_fraction}")
        if fit_iterations < 0:
            raise ValueError(f"fit_iterations: expected 0 or more, found {fit_iterations}")
        known = inspect.signature(DDPMScheduler).parameters
        super().__init__(**{name: value for name, value in self.config.items() if name in known})

    @classmethod
    def from_config(cls, config: dict | None = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a scheduler as diffusers does, also from configs with former names."""
        config, kwargs = current_arguments(config or {}, cls.RENAMED), current_arguments(kwargs, cls.RENAMED)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Step from x_t (B, C, H, W) to the next timestep of ``set_timesteps``. The last step returns the mean of x_0.

        Args:
            model_output: (B, 3 C, H, W): the network's prediction, then the variance and the third central moment of v given
                x_t.
        """
        channels = sample.shape[1]
        if model_output.shape[1] != 3 * channels:
            raise ValueError(
                f"model_output: expected {3 * channels} channels, a prediction and two moments of {channels} each, found "
                f"{model_output.shape[1]}; tools/train_moments.py trains the moments component of a model folder"
            )
        process, x_t = DiffusionProcess(self.alphas_cumprod.to(sample.device)), sample.float()
        prediction, variance, third = model_output.float().chunk(3, dim=1)
        t = torch.as_tensor(timestep, device=sample.device).reshape(1)
        previous = int(self.previous_timestep(timestep))
        s = torch.full((1,), previous, device=sample.device)
        x0 = x0_moments(process, prediction, variance.clamp_min(0.0), third, x_t, t, self.config.prediction_type)
        if self.config.clip_sample:
            x0.mean = x0.mean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if previous < 0:
            drawn = x0.mean
        else:
            moments, v = reverse_moments(process, x0, x_t, t, s)
            drawn = self._draw(moments, v + self.config.within_component_fraction * (moments.variance - v), generator)
        drawn = drawn.to(sample.dtype)
        if not return_dict:
            return drawn, x0.mean
        return DDPMSchedulerOutput(prev_sample=drawn, pred_original_sample=x0.mean)

    def _draw(self, moments: CentralMoments, floor: torch.Tensor, generator: Generators) -> torch.Tensor:
        """Sample from the kernel with these moments."""
        shape, device, dtype = moments.mean.shape, moments.mean.device, moments.mean.dtype
        noise = randn_tensor(shape, generator, device, dtype)
        if self.config.num_moments == 2:
            return moments.mean + moments.variance.sqrt() * noise
        if self.config.fit_iterations:
            first, second, variance = fit_two_gaussians(moments, floor, self.config.fit_iterations)
        else:
            first, second, variance = two_gaussians(moments, floor)
        # A standard normal sample is below this with probability WEIGHT, that of the first component.
        below = torch.special.ndtri(torch.tensor(WEIGHT, device=device, dtype=dtype))
        choice_shape = (shape[0], *[1] * (len(shape) - 1)) if self.config.choose_per_image else shape
        choice = randn_tensor(choice_shape, generator, device, dtype)
        return torch.where(choice < below, first, second) + variance.sqrt() * noise
