"""Two noisy views of one x_0: the noise of the second, their combination to one view, and the posterior flow given one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .process import GaussianPath

LEAST_RATIO = 1e-12
"""Lower bound of the signal-to-noise ratio of the second view, before taking its logarithm."""
LEAST_STEP = 1e-4
"""Lower bound of the step length in lambda, as a divisor."""
NEAREST, FARTHEST = 0.02, 0.98
"""Range of the second view's timestep before it is shifted, as fractions of the last one."""
Levels = tuple[torch.Tensor, torch.Tensor]


def draw_second_timesteps(path: GaussianPath, count: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Draw integer timesteps r of second views, (count,), uniform and then shifted to noise, on the generator's device."""
    low, high = NEAREST * path.last, FARTHEST * path.last
    uniform = torch.empty(count, device=generator.device).uniform_(low, high, generator=generator)
    return path.shifted(uniform, shift).round().long()


def joined_view(
    path: GaussianPath, x_t: torch.Tensor, t: torch.Tensor, x_r: torch.Tensor, r: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine two independent noisy views x_t and x_r of one x_0 (B, C, H, W) to (x_u, u), so that
    E[x_0 | x_t, x_r] = E[x_0 | x_u].

    With the signal-to-noise ratios l = a^2 / s^2,

        l_u = l_t + l_r,    m = (l_t x_t / a_t + l_r x_r / a_r) / l_u,    x_u = a_u m,

    as in noise-conditional variational score distillation (arXiv 2506.09416); u is real, (B,).
    """
    mean, ratio = joined(x_t, path.signal_and_noise(t, x_t), x_r, path.signal_and_noise(r, x_r))
    u = path.timestep_of(ratio.flatten())
    return path.signal_and_noise(u, mean)[0] * mean, u


def joined(x_t: torch.Tensor, levels_t: Levels, x_r: torch.Tensor, levels_r: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """Return m and l_u of ``joined_view``, from two views and their (a, s), each (B, 1, 1, 1)."""
    (a_t, s_t), (a_r, s_r) = levels_t, levels_r
    ratio = (a_t / s_t) ** 2 + (a_r / s_r) ** 2
    return (a_t / s_t**2 * x_t + a_r / s_r**2 * x_r) / ratio, ratio


def posterior_flow(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    path: GaussianPath,
    x_t: torch.Tensor,
    t: torch.Tensor,
    eta: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Draw x_0 from q(x_0 | x_t) as a function of eta ~ N(0, I), with ``steps`` evaluations of a denoiser.

    A second view x_r moves from pure noise, eta, to x_0 along the probability flow of q(x_r | x_t), which depends only on
    E[x_0 | x_t, x_r] = D(x_u, u). The solver is DPM-Solver++(2M) (arXiv 2211.01095), with steps evenly spaced in u from t to
    0. With lambda = log(a_r / s_r) and h_i = lambda_{i+1} - lambda_i:

        x_{i+1} = s_{i+1} / s_i x_i + (a_{i+1} - a_i s_{i+1} / s_i) (D_i + h_i / (2 h_{i-1}) (D_i - D_{i-1}))

    Args:
        denoise: (x_u, u) -> E[x_0 | x_u], u real, (B,).
        x_t, eta: (B, C, H, W).
        t: (B,).
    """
    levels_t = path.signal_and_noise(t, x_t)
    ratio_t = (levels_t[0] / levels_t[1]) ** 2

    found = denoise(x_t, t.float())
    x_r, a, s = eta, torch.zeros_like(levels_t[0]), torch.ones_like(levels_t[0])
    before, step_before = found, torch.zeros_like(a)
    for done in range(1, steps):
        u = t * (1.0 - done / steps)
        a_u, s_u = path.signal_and_noise(u, x_t)
        ratio = ((a_u / s_u) ** 2 - ratio_t).clamp_min(LEAST_RATIO)
        a_next, s_next = (ratio / (1.0 + ratio)).sqrt(), (1.0 + ratio).rsqrt()
        step = (a_next / s_next).log() - (a / s).log()
        # The first step is infinitely long in lambda, so neither it nor the second one has a correction.
        change = step / (2.0 * step_before.clamp_min(LEAST_STEP)) * (found - before) if done > 1 else 0.0
        x_r = s_next / s * x_r + (a_next - a * s_next / s) * (found + change)
        before, step_before, a, s = found, step, a_next, s_next
        found = denoise(a_u * joined(x_t, levels_t, x_r, (a, s))[0], u)
    return found
