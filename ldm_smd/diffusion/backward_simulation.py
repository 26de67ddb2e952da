"""Backward simulation: noisy images for training from the network's own sampling (DMD2, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .process import GaussianPath

STEP_COUNTS = (1, 2, 4)
"""Numbers of steps from pure noise to x_t. Sampling comes to a timestep in few steps or in many."""


def simulate_backward(
    draw: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    path: GaussianPath,
    x: torch.Tensor,
    t: torch.Tensor,
    etas: torch.Tensor,
    noises: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Sample x_t from pure noise, in ``steps`` evenly spaced draws from q(x_s | x_t, x_0).

    Args:
        draw: maps x_t, t and eta to a draw of x_0.
        x: pure noise, (B, C, h, w).
        t: where to stop, (B,).
        etas, noises: random numbers of each step, (B, steps or more, C, h, w).
    """
    now = torch.full_like(t, path.last)
    for step in range(steps):
        remaining = (now - t) / (steps - step)
        after = now - (remaining if t.is_floating_point() else remaining.round().long())
        mean, variance = path.posterior(x, draw(x, now, etas[:, step]), now, after)
        x, now = mean + variance.clamp_min(0.0).sqrt() * noises[:, step], after
    return x
