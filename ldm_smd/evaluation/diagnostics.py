"""Is the mixture a mixture? The spread of its components."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..diffusion.process import DiffusionProcess
from ..models.blocks import repeat
from ..models.unet import SMDUNet2DModel


@torch.no_grad()
def spread_over_eta(
    model: SMDUNet2DModel,
    process: DiffusionProcess,
    prediction_type: str,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    timesteps: Sequence[int],
    draws: int = 8,
    seed: int = 0,
) -> dict[int, float]:
    """{t: root of the mean, over pictures and numbers, of Var_eta[x_0(x_t, eta)]}, in units of the normalised latents.

    0 says that the mixture has collapsed to a Gaussian; 1 that a component says no more of the picture than the data's
    own spread. The true value falls from about 1 at the noisiest t to 0 at t = 0.
    """
    if not model.is_mixture:
        return dict.fromkeys(timesteps, 0.0)
    generator = torch.Generator(latents.device).manual_seed(seed)
    spread = {}
    for t in timesteps:
        steps = torch.full((len(latents),), t, device=latents.device)
        eps = torch.randn(latents.shape, generator=generator, device=latents.device)
        x_t = process.noise(latents, eps, steps)
        eta = torch.randn((len(latents) * draws, *latents.shape[1:]), generator=generator, device=latents.device)
        prediction = model(x_t, steps, labels, eta).sample.float()
        x0 = process.to_x0(prediction, repeat(x_t, draws), repeat(steps, draws), prediction_type)
        spread[t] = float(x0.unflatten(0, (len(latents), draws)).var(dim=1).mean().sqrt())
    return spread
