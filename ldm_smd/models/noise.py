"""The random numbers a mixture reads, in the shape of what is left to choose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import repeat

GRID = 8
"""Side of the grid on which the covariance of the latents is known: 64 numbers a channel, whatever the size of the latents."""

SMALLEST = 1e-6


class PosteriorNoise(nn.Module):
    """White eta -> e, what x_t leaves open about the leading principal components of the latents.

    If the data were one Gaussian of covariance Sigma = U diag(lambda) U^T, then (the Gaussian approximation of the score,
    arXiv 2412.09726)

        Cov(x_0 | x_t) = s_t^2 Sigma (a_t^2 Sigma + s_t^2)^-1,
        e = U diag(lambda / (a_t^2 lambda + s_t^2))^(1/2) U^T eta,

    and E[x_0 | x_t] + s_t e would be a draw of x_0. Taken over the first ``rank`` components, e is a draft of the picture in
    whose layout and colours all places agree, where from the paper's i.i.d. map each chooses its mode alone. What a few
    components cannot say, texture and edges, is the same for every draw of a step, and left to the steps after it.

    U is known on latents averaged to GRID x GRID places. Before ``fit``, or loaded weights, it is a random basis with unit
    variances.

    Args:
        channels, side: of the latents.
        rank: principal components; 0 for e = eta, as in the SMD paper.
        timesteps: of the noise schedule.
    """

    def __init__(self, channels: int, side: int, rank: int, timesteps: int) -> None:
        super().__init__()
        self.side = min(GRID, side)
        numbers = channels * self.side**2
        self.rank = min(rank, numbers)
        self.register_buffer("basis", nn.init.orthogonal_(torch.empty(self.rank, numbers)) if rank else torch.empty(0, numbers))
        self.register_buffer("variances", torch.ones(self.rank))
        self.register_buffer("alphas_cumprod", torch.zeros(timesteps))

    @property
    def is_fitted(self) -> bool:
        return self.rank == 0 or bool(self.alphas_cumprod.any())

    @torch.no_grad()
    def fit(self, latents: torch.Tensor, alphas_cumprod: torch.Tensor) -> None:
        """Take the components from latents (N, C, H, W), normalised as in training, and the noise schedule (T,)."""
        pooled = F.adaptive_avg_pool2d(latents, self.side).flatten(1).double()
        pooled = pooled - pooled.mean(dim=0)
        variances, basis = torch.linalg.eigh(pooled.T @ pooled / len(pooled))  # ascending
        self.variances.copy_(variances.flip(0)[: self.rank].clamp_min(0))
        self.basis.copy_(basis.flip(1)[:, : self.rank].T)
        self.alphas_cumprod.copy_(alphas_cumprod)

    def forward(self, eta: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """eta (B * M, C, H, W), timestep (B,) -> e, as eta."""
        if self.rank == 0:
            return eta
        cell = eta.shape[2] * eta.shape[3] / self.side**2
        on_grid = eta if cell == 1 else F.adaptive_avg_pool2d(eta, self.side) * cell**0.5  # of unit variance again
        # s_t^2 / cell is the noise in the mean of ``cell`` numbers. In float16 it may be 0, as may the variance of a component.
        alphabar = self.alphas_cumprod[timestep.long()][:, None]
        noise = 1.0 - alphabar
        gain = (self.variances / (alphabar * cell * self.variances + noise).clamp_min(SMALLEST)).sqrt()
        components = (on_grid.flatten(1) @ self.basis.T) * repeat(gain, len(eta) // len(timestep))
        drafts = (components @ self.basis).view_as(on_grid)
        return drafts if cell == 1 else F.interpolate(drafts, size=eta.shape[2:], mode="bilinear")
