"""Whether the mixture is one: the spread of its components."""

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
    """How far the components of the mixture are apart at one timestep.

    Attributes:
        over_eta: root of the mean, over images and elements, of Var_eta[x_0(x_t, eta)], in units of the normalised latents.
            The true value, the spread of the posterior q(x_0 | x_t), falls from about 1 at the noisiest t to 0 at t = 0.
        ratio: of ``over_eta`` to the posterior's spread. The latter is not known for images, but the error of its
            mean is: E|x_0 - E[x_0 | x_t]|^2 is the posterior's variance. So with the mean over M draws for E[x_0 | x_t],

                ratio^2 = (1 + 1/M) E Var_eta / E|x_0 - mean_j x_0j|^2

            1 for a calibrated model, 0 for one that has collapsed to a Gaussian.
    """

    over_eta: float
    ratio: float


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
    """Measure the spread at each of ``timesteps``, from ``draws`` draws for each of the latents (B, C, H, W)."""
    if not model.is_mixture:
        return dict.fromkeys(timesteps, Spread(0.0, 0.0))
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
        variance, error = x0.var(dim=1).mean(), (x0.mean(dim=1) - latents).square().mean()
        ratio = ((1 + 1 / draws) * variance / error).sqrt()
        spread[t] = Spread(float(variance.sqrt()), float(ratio))
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
    """Draw one x_0 from pure noise for each of the latents (B, C, H, W), with its label: how far a draw is from the nearest
    other one, on average, in units of that distance among the latents. About 1 where draws are as different as the data; 0
    where they are one; more where they are noisy."""
    generator = torch.Generator(latents.device).manual_seed(seed)
    x_t, eta = (torch.randn(latents.shape, generator=generator, device=latents.device) for _ in range(2))
    steps = torch.full((len(latents),), path.last, device=latents.device)
    draws = path.to_x0(model(x_t, steps, labels, eta).sample.float(), x_t, steps, prediction_type)

    def nearest(points: torch.Tensor) -> torch.Tensor:
        distances = torch.cdist(points.flatten(1), points.flatten(1))
        return distances.fill_diagonal_(float("inf")).amin(dim=1).mean()

    return float(nearest(draws) / nearest(latents).clamp_min(1e-6))


def has_collapsed(spread: dict[int, Spread]) -> bool:
    """Tell whether the draws agree at every timestep: the mixture is in effect a Gaussian model."""
    return all(at.ratio < COLLAPSED for at in spread.values())
