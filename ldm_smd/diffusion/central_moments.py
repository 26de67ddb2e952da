"""The first three moments of the step q(x_s | x_t), and a kernel of two Gaussians that matches them.

For Gaussian mixture solvers (arXiv 2311.00941): with few steps the distribution of x_s given x_t is skewed, which a Gaussian
step cannot represent. Everything is elementwise: each element of the latents has its own kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .process import GaussianPath, x0_per_prediction

WEIGHT = 1 / 3
"""Weight of the first component."""


@dataclass
class CentralMoments:
    """Mean, variance and third central moment of every element, as tensors of the same shape."""

    mean: torch.Tensor
    variance: torch.Tensor
    third: torch.Tensor


def x0_moments(
    path: GaussianPath,
    prediction: torch.Tensor,
    variance: torch.Tensor,
    third: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    prediction_type: str,
) -> CentralMoments:
    """Return the moments of x_0 given x_t, from the network's prediction and the central moments of v = a_t eps - s_t x_0.

    The moments of v are of order 1 at every t, whereas those of eps vanish with a_t and those of x_0 with s_t. x_0 is linear
    in v:

        Var(x_0) = (dx_0 / dv)^2 Var(v),    and for the third moment    (dx_0 / dv)^3.
    """
    gain = x0_per_prediction("v_prediction", *path.signal_and_noise(t, x_t))
    return CentralMoments(path.to_x0(prediction, x_t, t, prediction_type), gain**2 * variance, gain**3 * third)


def reverse_moments(
    path: GaussianPath, x0: CentralMoments, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor
) -> tuple[CentralMoments, torch.Tensor]:
    """Return the moments of x_s given x_t for s < t, and v, the variance of q(x_s | x_t, x_0).

    q(x_s | x_t, x_0) is N(c_t x_t + c_0 x_0, v), so by the law of total cumulance

        M = c_t x_t + c_0 E[x_0 | x_t],    C = v + c_0^2 Var(x_0 | x_t),    S = c_0^3 third(x_0 | x_t).
    """
    c_t, c_0, v = path.posterior_coefficients(t, s, x_t)
    return CentralMoments(c_t * x_t + c_0 * x0.mean, v + c_0**2 * x0.variance, c_0**3 * x0.third), v


def two_gaussians(moments: CentralMoments, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve for the mixture of N(m_1, var) and N(m_2, var), weights 1/3 and 2/3, with these moments: (m_1, m_2, var).

    With d = m_1 - m_2, its moments are M, var + 2 d^2 / 9 and 2 d^3 / 27, so

        d = (27 S / 2)^(1/3),    m_1 = M + 2 d / 3,    m_2 = M - d / 3,    var = C - 2 d^2 / 9.

    If var is below ``floor``, |d| is reduced until it is not: mean and variance stay exact, and the skew is approximated. A
    variance C below the floor is raised to it.
    """
    variance = torch.maximum(moments.variance, floor)
    widest = (4.5 * (variance - floor)).sqrt()
    d = moments.third.sign() * torch.minimum((13.5 * moments.third.abs()) ** (1 / 3), widest)
    return moments.mean + 2 * d / 3, moments.mean - d / 3, torch.maximum(variance - 2 * d**2 / 9, floor)


def moments_of(first: torch.Tensor, second: torch.Tensor, variance: torch.Tensor) -> CentralMoments:
    """Return the moments of 1/3 N(first, variance) + 2/3 N(second, variance)."""
    mean, d = first / 3 + 2 * second / 3, first - second
    return CentralMoments(mean, variance + 2 * d**2 / 9, 2 * d**3 / 27)
