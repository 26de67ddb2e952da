"""The process that a scheduler reverses, and a denoiser of one process under the scheduler of another."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Tell whether a scheduler is one for flow matching."""
    return isinstance(scheduler, FLOW_SCHEDULERS)


@dataclass(frozen=True)
class Process:
    """A path from data to noise, on the CPU, and what a network predicts on it."""

    path: GaussianPath
    prediction_type: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Process) or type(self.path) is not type(other.path) or self.path.last != other.path.last:
            return False
        t = torch.arange(self.path.last + 1)
        levels = [torch.stack(each.path.signal_and_noise(t, t)) for each in (self, other)]
        return self.prediction_type == other.prediction_type and torch.equal(*levels)


def path_of(scheduler: SchedulerMixin) -> GaussianPath:
    """Return the path that a scheduler reverses, on the CPU; one that ends without signal ends with next to none."""
    if is_flow(scheduler):
        return RectifiedFlow(scheduler.config.num_train_timesteps)
    return DiffusionProcess(scheduler.alphas_cumprod.cpu().clamp_min(LEAST_ALPHABAR))


def process_of(scheduler: SchedulerMixin) -> Process:
    """Return the process whose predictions a scheduler takes."""
    return Process(path_of(scheduler), "flow_prediction" if is_flow(scheduler) else scheduler.config.prediction_type)


@dataclass
class Question:
    """How a network is asked for its prediction at one timestep of a scheduler of another process, and what it then says.

    All that x_t = a x_0 + s eps says of x_0 is in its direction and in the ratio of a to s. So the network is asked at the t'
    of its own path at which that ratio is the same, about x_t scaled to the norm there, and its p' = alpha' x_0 + beta' eps
    gives what the scheduler takes, p = alpha x_0 + beta eps. With n^2 = a^2 + s^2 and D' = a' beta' - s' alpha':

        x' = (n' / n) x_t,    x_0 = (beta' x' - s' p') / D',    eps = (a' p' - alpha' x') / D'.

    That is exact, but for ratios that the network's own path does not have: there it is asked at its end.

    Attributes:
        timestep: t', on the device.
        scale: n' / n.
        of_sample, of_prediction: p as a sum of x_t and p', each times its factor.
    """

    timestep: torch.Tensor
    scale: float = 1.0
    of_sample: float = 0.0
    of_prediction: float = 1.0

    def asked(self, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x', t')."""
        return x_t if self.scale == 1.0 else self.scale * x_t, self.timestep

    def answer(self, prediction: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """Return p. What a prediction has more channels than x_t, the moments of v, is the same on every path."""
        if (self.of_sample, self.of_prediction) == (0.0, 1.0):
            return prediction
        channels = x_t.shape[1]
        mean = self.of_sample * x_t + self.of_prediction * prediction[:, :channels]
        return torch.cat((mean, prediction[:, channels:]), dim=1)


def questions(own: Process, other: Process, timesteps: torch.Tensor, device: torch.device) -> list[Question]:
    """Return how a network that was trained on ``own`` is asked at each of these timesteps, on the CPU, of ``other``."""
    if own == other:
        return [Question(t) for t in timesteps.to(device)]
    t = timesteps.double()
    a, s = other.path.signal_and_noise(t, t)
    own_t = own.path.timestep_of((a / s) ** 2)
    own_a, own_s = own.path.signal_and_noise(own_t, own_t)
    alpha, beta = prediction_coefficients(other.prediction_type, a, s)
    own_alpha, own_beta = prediction_coefficients(own.prediction_type, own_a, own_s)
    scale = torch.hypot(own_a, own_s) / torch.hypot(a, s)
    determinant = own_a * own_beta - own_s * own_alpha
    of_sample = scale * (alpha * own_beta - beta * own_alpha) / determinant
    of_prediction = (beta * own_a - alpha * own_s) / determinant
    numbers = torch.stack((scale, of_sample, of_prediction), dim=1).tolist()
    return [Question(each, *factors) for each, factors in zip(own_t.float().to(device), numbers)]


def predicted_x0(
    scheduler: SchedulerMixin, prediction: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Compute x_0 (B, C, h, w) from a prediction at one timestep, whose channels after the first C are not read."""
    process, mean = process_of(scheduler), prediction[:, : x_t.shape[1]]
    path = process.path.to(x_t.device)
    return path.to_x0(mean, x_t, timestep[None].to(x_t.device), process.prediction_type).to(x_t.dtype)
