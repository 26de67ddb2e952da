"""Diagnostics of mixtures: the spread of their draws, and detection of collapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange

from ..diffusion.process import GaussianPath
from ..models.blocks import repeat
from ..models.unet import SMDUNet2DModel

COLLAPSED = 0.1
DIAGNOSTIC_TIMESTEPS = (99, 249, 499, 749, 999)


@dataclass(frozen=True)
class Spread:
    """Spread of the draws of a mixture at one timestep.

    Attributes:
        over_eta: square root of the mean, over images and elements, of Var_eta[x_0(x_t, eta)], in units of the normalised
            latents. The true value, the spread of the posterior q(x_0 | x_t), falls from about 1 at the noisiest t to 0 at
            t = 0.
        ratio: ``over_eta`` relative to the spread of the posterior. The latter is unknown for images, but its variance is
            E|x_0 - E[x_0 | x_t]|^2, the error of the posterior mean. So, with the mean over M draws for E[x_0 | x_t],

                ratio^2 = (1 + 1/M) E Var_eta / E|x_0 - mean_j x_0j|^2

            It is 1 for a calibrated model and 0 for one that has collapsed to a Gaussian model.
        gain: how strongly the draws show what x_t shows of x_0, relative to the posterior. With the mean draw m,

                gain = E[m m'] / E[m x_0],

            where m' is the mean of other draws, so that their spread does not count. It is 1 for a calibrated model, since then
            E[m | x_t] = E[x_0 | x_t]. Above 1, each step exaggerates its input, and many steps give too much contrast.
    """

    over_eta: float
    ratio: float
    gain: float


def diagnostic_timesteps(path: GaussianPath) -> list[int]:
    """Return the DIAGNOSTIC_TIMESTEPS that a path has."""
    return [t for t in DIAGNOSTIC_TIMESTEPS if t <= path.last]


@torch.no_grad()
def spread_over_eta(
    model: SMDUNet2DModel,
    path: GaussianPath,
    prediction_type: str,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    timesteps: Sequence[int],
    draws: int = 8,
    seed: int = 0,
) -> dict[int, Spread]:
    """Measure the spread at each timestep, from ``draws`` draws for each of the latents (B, C, H, W)."""
    if not model.is_mixture:
        return dict.fromkeys(timesteps, Spread(0.0, 0.0, 1.0))
    generator = torch.Generator(latents.device).manual_seed(seed)
    spread = {}
    for t in timesteps:
        steps = torch.full((len(latents),), t, device=latents.device)
        eps = torch.randn(latents.shape, generator=generator, device=latents.device)
        x_t = path.noise(latents, eps, steps)
        eta = torch.randn((len(latents) * draws, *latents.shape[1:]), generator=generator, device=latents.device)
        prediction = model(x_t, steps, labels, eta).sample.float()
        x0 = path.to_x0(prediction, repeat(x_t, draws), repeat(steps, draws), prediction_type)
        x0 = rearrange(x0, "(b m) ... -> b m ...", m=draws)
        mean = x0.mean(dim=1)
        variance, error = x0.var(dim=1).mean(), (mean - latents).square().mean()
        ratio = ((1 + 1 / draws) * variance / error).sqrt()
        gain = (mean.square().mean() - variance / draws) / (mean * latents).mean().clamp_min(1e-6)
        spread[t] = Spread(float(variance.sqrt()), float(ratio), float(gain))
    return spread


@torch.no_grad()
def nearest_neighbour_ratio(
    model: SMDUNet2DModel,
    path: GaussianPath,
    prediction_type: str,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    seed: int = 0,
) -> float:
    """Return the mean nearest-neighbour distance among draws from pure noise, relative to that among the latents.

    There is one draw of x_0 for each of the latents (B, C, H, W), with its label. The ratio is about 1 if the draws are as
    diverse as the data, 0 if they are all equal, and above 1 if they are noisy.
    """
    generator = torch.Generator(latents.device).manual_seed(seed)
    x_t, eta = (torch.randn(latents.shape, generator=generator, device=latents.device) for _ in range(2))
    steps = torch.full((len(latents),), path.last, device=latents.device)
    draws = path.to_x0(model(x_t, steps, labels, eta).sample.float(), x_t, steps, prediction_type)

    def nearest(points: torch.Tensor) -> torch.Tensor:
        distances = torch.cdist(points.flatten(1), points.flatten(1))
        return distances.fill_diagonal_(float("inf")).amin(dim=1).mean()

    return float(nearest(draws) / nearest(latents).clamp_min(1e-6))


def has_collapsed(spread: dict[int, Spread]) -> bool:
    """Return whether the draws are almost equal at every timestep, as in a Gaussian model."""
    return all(at.ratio < COLLAPSED for at in spread.values())
