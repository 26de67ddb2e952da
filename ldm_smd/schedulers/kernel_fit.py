"""The kernel of GMSScheduler as fitted in its paper, for comparison."""

from __future__ import annotations

import torch

from ..diffusion.central_moments import CentralMoments, moments_of

PAPER_ITERATIONS = 70


def fit_two_gaussians(
    moments: CentralMoments, floor: torch.Tensor, iterations: int = PAPER_ITERATIONS, separation: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit the mixture of ``two_gaussians`` as the paper does: (m_1, m_2, var).

    Adan with learning rate 0.06 minimises the squared errors of the first three raw moments, starting from m_1 = M,
    m_2 = M - 0.001, var = C, where the gradient of the skew is almost zero. With ``separation`` the means start this many
    standard deviations apart, in the direction of the skew.
    """
    from timm.optim import Adan  # here, because it imports all of timm's models

    with torch.enable_grad():
        d = separation * moments.variance.sqrt() * moments.third.sign()
        first = (moments.mean + 2 * d / 3).requires_grad_()
        second = (moments.mean - (d / 3 if separation else 1e-3)).requires_grad_()
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


def _raw(moments: CentralMoments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, variance, third = moments.mean, moments.variance, moments.third
    return mean, mean**2 + variance, mean**3 + 3 * mean * variance + third
