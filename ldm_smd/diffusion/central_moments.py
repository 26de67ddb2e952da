"""The step q(x_s | x_t) beyond its mean: the first three moments, and a kernel of two Gaussians that has them.

Gaussian mixture solvers (arXiv 2311.00941): at few steps the distribution of x_s given x_t is skewed, which a Gaussian step
cannot be. All is elementwise: each number of the latents has its own kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .process import DiffusionProcess

WEIGHT = 1 / 3
"""Weight of the first of the two components."""
PAPER_ITERATIONS = 70


@dataclass
class Moments:
    """Mean, variance and third central moment of every element, as tensors of one shape."""

    mean: torch.Tensor
    variance: torch.Tensor
    third: torch.Tensor


def x0_moments(
    process: DiffusionProcess,
    prediction: torch.Tensor,
    variance: torch.Tensor,
    third: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    prediction_type: str,
) -> Moments:
    """Those of x_0 given x_t, from a prediction of the mean and the central moments of v = a_t eps - s_t x_0 given x_t.

    v's are of the order of 1 at every t, where those of eps go to 0 with a_t and those of x_0 with s_t:

        x_0 = a_t x_t - s_t v,    so    Var(x_0) = s_t^2 Var(v),    and for the third moment    -s_t^3.
    """
    _, s = process.signal_and_noise(t, x_t)
    return Moments(process.to_x0(prediction, x_t, t, prediction_type), s**2 * variance, -(s**3) * third)


def reverse_moments(
    process: DiffusionProcess, x0: Moments, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor
) -> tuple[Moments, torch.Tensor]:
    """Those of x_s given x_t for s < t, and the variance that x_s has beyond that of x_0.

    q(x_s | x_t, x_0) is N(c_t x_t + c_0 x_0, v), so by the law of total cumulance

        M = c_t x_t + c_0 E[x_0 | x_t],    C = v + c_0^2 Var(x_0 | x_t),    S = c_0^3 third(x_0 | x_t).
    """
    c_t, c_0, v = process.posterior_coefficients(t, s, x_t)
    return Moments(c_t * x_t + c_0 * x0.mean, v + c_0**2 * x0.variance, c_0**3 * x0.third), v


def two_gaussians(moments: Moments, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mixture of N(m_1, var) and N(m_2, var), weights 1/3 and 2/3, that has these moments: (m_1, m_2, var).

    With d = m_1 - m_2 its moments are M, var + 2 d^2 / 9 and 2 d^3 / 27, so

        d = (27 S / 2)^(1/3),    m_1 = M + 2 d / 3,    m_2 = M - d / 3,    var = C - 2 d^2 / 9.

    Where var would be below ``floor`` |d| shrinks until it is not: mean and variance stay exact, and the skew comes as near as
    it can. A variance C below the floor is raised to it.
    """
    variance = torch.maximum(moments.variance, floor)
    widest = (4.5 * (variance - floor)).sqrt()
    d = moments.third.sign() * torch.minimum((13.5 * moments.third.abs()) ** (1 / 3), widest)
    return moments.mean + 2 * d / 3, moments.mean - d / 3, torch.maximum(variance - 2 * d**2 / 9, floor)


def moments_of(first: torch.Tensor, second: torch.Tensor, variance: torch.Tensor) -> Moments:
    """Return the moments of 1/3 N(first, variance) + 2/3 N(second, variance)."""
    mean, d = first / 3 + 2 * second / 3, first - second
    return Moments(mean, variance + 2 * d**2 / 9, 2 * d**3 / 27)


def fit_two_gaussians(
    moments: Moments, floor: torch.Tensor, iterations: int = PAPER_ITERATIONS, apart: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mixture of ``two_gaussians`` as the paper finds it, to compare with: (m_1, m_2, var).

    Adan, learning rate 0.06, on the squared errors of the first three raw moments, from m_1 = M, m_2 = M - 0.001, var = C;
    there the gradient of the skew is all but zero. With ``apart`` the means start so many standard deviations from
    each other, to the side of the skew.
    """
    from timm.optim import Adan  # not above: it brings all of timm's models

    with torch.enable_grad():
        d = apart * moments.variance.sqrt() * moments.third.sign()
        first = (moments.mean + 2 * d / 3).requires_grad_()
        second = (moments.mean - (d / 3 if apart else 1e-3)).requires_grad_()
        variance = (moments.variance - 2 * d**2 / 9).requires_grad_()
        optimizer = Adan([first, second, variance], lr=0.06)
        wanted = _raw(moments)
        for _ in range(iterations):
            optimizer.zero_grad()
            errors = [(a - b).square().sum() for a, b in zip(_raw(moments_of(first, second, variance)), wanted)]
            torch.stack(errors).sum().backward()
            optimizer.step()
            with torch.no_grad():
                variance.copy_(torch.maximum(variance, floor))
    return first.detach(), second.detach(), variance.detach()


def _raw(moments: Moments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, variance, third = moments.mean, moments.variance, moments.third
    return mean, mean**2 + variance, mean**3 + 3 * mean * variance + third
