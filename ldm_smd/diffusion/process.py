"""The variance-preserving forward process, its posterior, and the three things a network may predict.

Notation: x_t = a_t x_0 + s_t eps with a_t = sqrt(alphabar_t), s_t = sqrt(1 - alphabar_t); a step goes from t to s < t.
"""

from __future__ import annotations

import torch


class DiffusionProcess:
    """Args:
    alphas_cumprod: alphabar_t for t = 0 .. T-1, as diffusers schedulers have it. Kept in its own dtype.
    """

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> DiffusionProcess:
        return DiffusionProcess(self.alphas_cumprod.to(device))

    def signal_and_noise(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a_t, s_t), each (B, 1, ..., 1) to multiply ``like`` (B, ...) with. t = -1 is clean data: (1, 0)."""
        alphabar = torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp_min(0)])
        alphabar = alphabar.view(-1, *[1] * (like.ndim - 1))
        return alphabar.sqrt(), (1.0 - alphabar).sqrt()

    def noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = a_t x_0 + s_t eps."""
        a, s = self.signal_and_noise(t, x0)
        return a * x0 + s * eps

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """What the network is to predict: eps, v = a_t eps - s_t x_0, or x_0."""
        if prediction_type == "epsilon":
            return eps
        if prediction_type == "sample":
            return x0
        a, s = self.signal_and_noise(t, x0)
        return a * eps - s * x0

    def to_x0(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """x_0 from a prediction: (x_t - s_t eps) / a_t, a_t x_t - s_t v, or x_0 itself."""
        if prediction_type == "sample":
            return prediction
        a, s = self.signal_and_noise(t, x_t)
        if prediction_type == "epsilon":
            return (x_t - s * prediction) / a
        return a * x_t - s * prediction

    def posterior(
        self, x_t: torch.Tensor, x0: torch.Tensor, t: torch.Tensor, s: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean c_t x_t + c_0 x_0 and variance v of q(x_s | x_t, x_0) for s < t."""
        c_t, c_0, variance = self.posterior_coefficients(t, s, x_t)
        return c_t * x_t + c_0 * x0, variance

    def posterior_coefficients(
        self, t: torch.Tensor, s: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_t, c_0, v), shaped as by ``signal_and_noise``. With a_ts = a_t / a_s and beta_ts = s_t^2 - a_ts^2 s_s^2:

        c_t = a_ts s_s^2 / s_t^2,    c_0 = a_s beta_ts / s_t^2,    v = s_s^2 beta_ts / s_t^2
        """
        a_t, s_t = self.signal_and_noise(t, like)
        a_s, s_s = self.signal_and_noise(s, like)
        a_ts = a_t / a_s
        beta_ts = s_t**2 - a_ts**2 * s_s**2
        return a_ts * s_s**2 / s_t**2, a_s * beta_ts / s_t**2, s_s**2 * beta_ts / s_t**2
