"""The diffusion process of a scheduler, and conversion of predictions between processes.

A denoiser that was trained on one process can be sampled by a scheduler of another.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SchedulerMixin

from ..diffusion.process import (
    LEAST_ALPHABAR,
    DiffusionProcess,
    GaussianPath,
    RectifiedFlow,
    prediction_coefficients,
)

FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Tell whether a scheduler is a flow matching scheduler."""
    return isinstance(scheduler, FLOW_SCHEDULERS)


@dataclass(frozen=True)
class Process:
    """A path from data to noise, on the CPU, and the prediction type of a network on it."""

    path: GaussianPath
    prediction_type: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Process) or type(self.path) is not type(other.path) or self.path.last != other.path.last:
            return False
        t = torch.arange(self.path.last + 1)
        levels = [torch.stack(each.path.signal_and_noise(t, t)) for each in (self, other)]
        return self.prediction_type == other.prediction_type and torch.equal(*levels)


def path_of(scheduler: SchedulerMixin) -> GaussianPath:
    """Return the path that a scheduler reverses, on the CPU. A signal of zero at its end is raised to a tiny one."""
    if is_flow(scheduler):
        return RectifiedFlow(scheduler.config.num_train_timesteps)
    return DiffusionProcess(scheduler.alphas_cumprod.cpu().clamp_min(LEAST_ALPHABAR))


def process_of(scheduler: SchedulerMixin) -> Process:
    """Return the process whose predictions a scheduler expects."""
    return Process(path_of(scheduler), "flow_prediction" if is_flow(scheduler) else scheduler.config.prediction_type)


def read_process(path: Path) -> tuple[dict[str, Any], Process] | None:
    """Read a scheduler of diffusers: its configuration, and its process. None where there is none, or another."""
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
        cls = getattr(diffusers, configuration["_class_name"])
        return configuration, process_of(cls.from_config(configuration))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError):
        return None


@dataclass
class PredictionConversion:
    """Evaluates a network of one process at a timestep of a scheduler of another process.

    The information about x_0 in x_t = a x_0 + s eps depends only on the ratio a / s, not on the scale of x_t. So the network
    is evaluated at the timestep t' of its own path that has the same ratio, on x_t rescaled to the norm there. Its prediction
    p' = alpha' x_0 + beta' eps is converted to the one the scheduler expects, p = alpha x_0 + beta eps. With n^2 = a^2 + s^2
    and D' = a' beta' - s' alpha':

        x' = (n' / n) x_t,    x_0 = (beta' x' - s' p') / D',    eps = (a' p' - alpha' x') / D'.

    This is exact. Ratios outside the network's own path are clamped to its end.

    Attributes:
        timestep: t', on the device.
        input_scale: n' / n.
        sample_weight, prediction_weight: p = sample_weight * x_t + prediction_weight * p'.
    """

    timestep: torch.Tensor
    input_scale: float = 1.0
    sample_weight: float = 0.0
    prediction_weight: float = 1.0

    def network_inputs(self, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x', t')."""
        return x_t if self.input_scale == 1.0 else self.input_scale * x_t, self.timestep

    def to_scheduler(self, prediction: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """Return p. Channels beyond those of x_t hold the moments of v, which are the same on every path."""
        if (self.sample_weight, self.prediction_weight) == (0.0, 1.0):
            return prediction
        channels = x_t.shape[1]
        mean = self.sample_weight * x_t + self.prediction_weight * prediction[:, :channels]
        return torch.cat((mean, prediction[:, channels:]), dim=1)


def prediction_conversions(
    own: Process, other: Process, timesteps: torch.Tensor, device: torch.device
) -> list[PredictionConversion]:
    """Return the conversion at each timestep of ``other`` for a network trained on ``own``; ``timesteps`` are on the CPU."""
    if own == other:
        return [PredictionConversion(t) for t in timesteps.to(device)]
    t = timesteps.double()
    a, s = other.path.signal_and_noise(t, t)
    own_t = own.path.timestep_of((a / s) ** 2)
    own_a, own_s = own.path.signal_and_noise(own_t, own_t)
    alpha, beta = prediction_coefficients(other.prediction_type, a, s)
    own_alpha, own_beta = prediction_coefficients(own.prediction_type, own_a, own_s)
    input_scale = torch.hypot(own_a, own_s) / torch.hypot(a, s)
    determinant = own_a * own_beta - own_s * own_alpha
    sample_weight = input_scale * (alpha * own_beta - beta * own_alpha) / determinant
    prediction_weight = (beta * own_a - alpha * own_s) / determinant
    rows = torch.stack((input_scale, sample_weight, prediction_weight), dim=1).tolist()
    return [PredictionConversion(each, *row) for each, row in zip(own_t.float().to(device), rows)]


def predicted_x0(
    scheduler: SchedulerMixin, prediction: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Compute x_0 (B, C, h, w) from a prediction at one timestep. Channels beyond the first C are ignored."""
    process, mean = process_of(scheduler), prediction[:, : x_t.shape[1]]
    path = process.path.to(x_t.device)
    return path.to_x0(mean, x_t, timestep[None].to(x_t.device), process.prediction_type).to(x_t.dtype)
