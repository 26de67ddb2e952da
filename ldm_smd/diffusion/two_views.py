"""Two noisy views of one x_0 as one: what a denoiser must be given to know x_0 from both."""

from __future__ import annotations

import torch

from .process import GaussianPath


def joined_view(
    path: GaussianPath, x_t: torch.Tensor, t: torch.Tensor, x_r: torch.Tensor, r: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """From x_t and x_r, noised independently from one x_0 (B, C, H, W), to (x_u, u): E[x_0 | x_t, x_r] = E[x_0 | x_u].

    With the signal-to-noise ratios l = a^2 / s^2,

        l_u = l_t + l_r,    m = (l_t x_t / a_t + l_r x_r / a_r) / l_u,    x_u = a_u m,

    as in noise-conditional variational score distillation (arXiv 2506.09416); u is real, (B,).
    """
    (a_t, s_t), (a_r, s_r) = path.signal_and_noise(t, x_t), path.signal_and_noise(r, x_r)
    ratio = (a_t / s_t) ** 2 + (a_r / s_r) ** 2
    mean = (a_t / s_t**2 * x_t + a_r / s_r**2 * x_r) / ratio
    u = path.timestep_of(ratio.flatten())
    return path.signal_and_noise(u, mean)[0] * mean, u
