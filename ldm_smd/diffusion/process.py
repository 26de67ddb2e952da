"""Gaussian paths from data to noise, x_t = a_t x_0 + s_t eps, and prediction types. A reverse step goes from t to s < t."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

Coefficients = tuple[torch.Tensor | float, torch.Tensor | float]
LEAST_ALPHABAR = 1e-12
"""Lower bound of alphabar before taking logarithms, because schedules may end without signal."""


def prediction_coefficients(prediction_type: str, a: torch.Tensor, s: torch.Tensor) -> Coefficients:
    """Return (alpha, beta) of the prediction p = alpha x_0 + beta eps. Together with x_t, it determines x_0:

    x_0 = (beta x_t - s p) / (a beta - s alpha)
    """
    known: dict[str, Coefficients] = {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "flow_prediction": (-1.0, 1.0)}
    return (-s, a) if prediction_type == "v_prediction" else known[prediction_type]


def x0_per_prediction(prediction_type: str, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Return dx_0 / dp = -s / (a beta - s alpha) at fixed x_t: the factor from the error of p to that of x_0."""
    if prediction_type == "sample":
        return torch.ones_like(s)
    alpha, beta = prediction_coefficients(prediction_type, a, s)
    return -s / (a * beta - s * alpha)


class GaussianPath(ABC):
    """Signal and noise (a_t, s_t) for integer or real t, (B,), up to ``last``. Subclasses define them."""

    last: int

    @abstractmethod
    def signal_and_noise(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (a_t, s_t), each (B, 1, ..., 1), to broadcast with ``like`` (B, ...). t = -1 is clean data."""

    @abstractmethod
    def timestep_of(self, ratio: torch.Tensor) -> torch.Tensor:
        """Return the real t with signal-to-noise ratio a_t^2 / s_t^2 = ``ratio``, (B,); 0 if it is never that large."""

    def shifted(self, t: torch.Tensor, shift: float) -> torch.Tensor:
        """Return the real timesteps (B,) with the noise-to-signal ratio of t times ``shift``, if the path ends in pure noise.

        If it ends at a finite ratio m, the largest timesteps would be clamped to that end. So, with rho the ratio s / a of t,

            1 / rho' = 1 / (shift rho) + (1 - 1 / shift) / m,

        which leaves the end where it is. A shift above 1 is usual for larger images (arXiv 2301.11093, 2403.03206).
        """
        (a, s), (a_end, s_end) = self.signal_and_noise(t, t), self.signal_and_noise(torch.full_like(t, self.last), t)
        return self.timestep_of((a / s / shift + (1.0 - 1.0 / shift) * a_end / s_end) ** 2)

    def random_t(self, count: int, shift: float = 1.0, **options: Any) -> torch.Tensor:
        """Draw timesteps for training, (count,), uniform and then ``shifted``. ``options``: those of torch.rand.

        They are real and above 0. Those of a noise schedule are integers from 0 on.
        """
        t = self.last * (1.0 - torch.rand(count, **options))
        return t if shift == 1.0 else self.shifted(t, shift)

    def to(self, device: torch.device) -> GaussianPath:
        return self

    def noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = a_t x_0 + s_t eps."""
        a, s = self.signal_and_noise(t, x0)
        return a * x0 + s * eps

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """Return the target of the network, alpha x_0 + beta eps."""
        alpha, beta = prediction_coefficients(prediction_type, *self.signal_and_noise(t, x0))
        return alpha * x0 + beta * eps

    def to_x0(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """x_0 = (beta x_t - s_t p) / (a_t beta - s_t alpha) from a prediction p."""
        if prediction_type == "sample":  # also where s_t is 0
            return prediction
        a, s = self.signal_and_noise(t, x_t)
        alpha, beta = prediction_coefficients(prediction_type, a, s)
        return (beta * x_t - s * prediction) / (a * beta - s * alpha)

    def posterior(
        self, x_t: torch.Tensor, x0: torch.Tensor, t: torch.Tensor, s: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean c_t x_t + c_0 x_0 and variance v of q(x_s | x_t, x_0) for s < t."""
        c_t, c_0, variance = self.posterior_coefficients(t, s, x_t)
        return c_t * x_t + c_0 * x0, variance

    def posterior_coefficients(
        self, t: torch.Tensor, s: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (c_t, c_0, v), shaped as in ``signal_and_noise``. With a_ts = a_t / a_s and beta_ts = s_t^2 - a_ts^2 s_s^2:

        c_t = a_ts s_s^2 / s_t^2,    c_0 = a_s beta_ts / s_t^2,    v = s_s^2 beta_ts / s_t^2
        """
        a_t, s_t = self.signal_and_noise(t, like)
        a_s, s_s = self.signal_and_noise(s, like)
        a_ts = a_t / a_s
        beta_ts = s_t**2 - a_ts**2 * s_s**2
        return a_ts * s_s**2 / s_t**2, a_s * beta_ts / s_t**2, s_s**2 * beta_ts / s_t**2


class DiffusionProcess(GaussianPath):
    """The variance-preserving process of a noise schedule: a_t = sqrt(alphabar_t), s_t = sqrt(1 - alphabar_t).

    Args:
        alphas_cumprod: alphabar_t for t = 0 .. T-1, as in diffusers schedulers. Its dtype is kept.
    """

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod
        self.last = len(alphas_cumprod) - 1

    def to(self, device: torch.device) -> DiffusionProcess:
        return DiffusionProcess(self.alphas_cumprod.to(device))

    def random_t(self, count: int, shift: float = 1.0, **options: Any) -> torch.Tensor:
        t = torch.randint(self.last + 1, (count,), **options)
        return t if shift == 1.0 else self.shifted(t, shift).round().long()

    def signal_and_noise(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = self._between(t) if t.is_floating_point() else self.alphas_cumprod[t.clamp_min(0)]
        alphabar = torch.where(t < 0, 1.0, known).view(-1, *[1] * (like.ndim - 1))
        return alphabar.sqrt(), (1.0 - alphabar).sqrt()

    def timestep_of(self, ratio: torch.Tensor) -> torch.Tensor:
        known = log_ratio(self.alphas_cumprod).flip(0)
        wanted = ratio.to(known.dtype).log().clamp(known[0], known[-1])
        above = torch.searchsorted(known, wanted).clamp_min(1)
        gap = known[above] - known[above - 1]  # 0 where the schedule has no signal left, which is clamped
        between = torch.where(gap > 0, (wanted - known[above - 1]) / gap, 0.0)
        return self.last - (above - 1 + between)

    def _between(self, t: torch.Tensor) -> torch.Tensor:
        """Return alphabar at real t, interpolated linearly in log(alphabar / (1 - alphabar))."""
        t = t.clamp(0, self.last)
        ends = self.alphas_cumprod[torch.stack((t.floor(), t.ceil())).long()]
        below, above = log_ratio(ends)
        return torch.where(t == t.floor(), ends[0], below.lerp(above, t.frac().to(ends.dtype)).sigmoid())


def log_ratio(alphabar: torch.Tensor) -> torch.Tensor:
    """Return log(alphabar / (1 - alphabar)), finite even without signal or noise."""
    limits = torch.finfo(alphabar.dtype)
    return alphabar.clamp(max(LEAST_ALPHABAR, limits.tiny), 1.0 - limits.eps).logit()


class RectifiedFlow(GaussianPath):
    """Flow matching along straight lines: a_t = 1 - t / T, s_t = t / T for real t in [0, T], as in diffusers.

    Its prediction type, the velocity eps - x_0, is "flow_prediction".
    """

    def __init__(self, num_timesteps: int = 1000) -> None:
        self.last = num_timesteps

    def signal_and_noise(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (a_t, s_t) in the dtype of ``like``, float32 or better."""
        t = t.clamp_min(0).to(torch.promote_types(like.dtype, torch.float32)).view(-1, *[1] * (like.ndim - 1))
        return (self.last - t) / self.last, t / self.last

    def timestep_of(self, ratio: torch.Tensor) -> torch.Tensor:
        return self.last / (1.0 + ratio.sqrt())
