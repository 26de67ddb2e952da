"""PosteriorNoise: the random input of a mixture, with the fitted posterior distribution of the coarse latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..diffusion.gaussian_mixture import choose, shared_responsibilities
from .blocks import repeat

GRID = 8
"""Side of the grid on which the latents are modelled: 64 elements per channel, for latents of any size."""

SMALLEST = 1e-4


class PosteriorNoise(nn.Module):
    """Maps white noise eta to e, a posterior draw of the leading principal components of the latents given x_t.

    The ``rank`` principal components c of x_0 are modelled by a Gaussian mixture. Its modes share a covariance and have weights
    w_ky for every class y:

        p(c | y) = sum_k w_ky N(c; m_k, diag(v)).

    Then q(c | x_t, y) is a Gaussian mixture in closed form. With the components u of x_t = a_t x_0 + s_t eps,

        r_k ~ w_ky N(u; a_t m_k, a_t^2 v + s_t^2),    k drawn from r,    mbar = sum_k r_k m_k,
        e = s_t (m_k - mbar) / (a_t^2 v + s_t^2) + (v / (a_t^2 v + s_t^2))^(1/2) eta,

    and E[c | x_t] + s_t e is a draw of q(c | x_t). In latent space this is a draft of the image, with consistent layout and
    colours, whereas the paper's i.i.d. noise lets each position pick a mode independently. Details beyond these components,
    such as texture and edges, are equal in all draws of a step and are left to later steps. With one mode this is the Gaussian
    approximation of the score (arXiv 2412.09726), Cov(e) = Sigma (a_t^2 Sigma + s_t^2)^-1.

    e is returned in the space of the network's prediction. Adding it to the prediction of a Gaussian model gives a mixture.

    Any Gaussian path is a variance-preserving one, a_t^2 + s_t^2 = 1, up to a norm. x_t and e are divided by it.

    The components are those of latents averaged to GRID x GRID positions. Before ``fit_posterior_noise`` or loading of weights,
    they are random directions with unit variances, for v-prediction and timesteps without signal.

    Args:
        channels, side: shape of the latents.
        rank: number of principal components; 0 for e = eta, as in the SMD paper.
        modes: K.
        num_classes: None for an unconditional model.
        timesteps: number of timesteps, 0 to the last of the path.
    """

    basis: torch.Tensor
    centre: torch.Tensor
    log_weights: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor
    alphas_cumprod: torch.Tensor
    scale: torch.Tensor
    norms: torch.Tensor

    def __init__(
        self, channels: int, side: Sequence[int] | int | None, rank: int, modes: int, num_classes: int | None, timesteps: int
    ) -> None:
        super().__init__()
        self.side = GRID if side is None else min(GRID, *(side if isinstance(side, Sequence) else [side]))
        elements = channels * self.side**2
        self.rank = rank = min(rank, elements - 1)
        basis = torch.empty(rank, elements, dtype=torch.float32)  # also if a model is loaded in half precision
        self.register_buffer("basis", nn.init.orthogonal_(basis) if rank else basis)
        self.register_buffer("centre", torch.zeros(elements))
        self.register_buffer("log_weights", torch.zeros((num_classes or 0) + 1, modes).log_softmax(dim=1))
        self.register_buffer("means", torch.zeros(modes, rank))
        self.register_buffer("variances", torch.ones(rank))
        self.register_buffer("alphas_cumprod", torch.zeros(timesteps))
        self.register_buffer("scale", torch.full((timesteps,), -1.0))
        self.register_buffer("norms", torch.ones(timesteps))

    @property
    def initial_gate(self) -> float:
        """Initial weight of e in the prediction of a new mixture: 1 for fitted noise, 0 for white noise."""
        return 1.0 if self.rank else 0.0

    @property
    def is_fitted(self) -> bool:
        return self.rank == 0 or bool(self.alphas_cumprod.any())

    @torch.no_grad()
    def forward(
        self, eta: torch.Tensor | None, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map eta (B * M, C, H, W), or None for one draw per image, x_t (B, C, H, W), timestep (B,) or (1,) and class_labels
        (B,) to e, with the shape of eta, channels last."""
        if eta is not None and (eta.shape[1:] != sample.shape[1:] or len(eta) == 0 or len(eta) % len(sample)):
            wanted = f"(B * M, {', '.join(map(str, sample.shape[1:]))}) with B = {len(sample)}"
            raise ValueError(f"eta: expected {wanted}, found {tuple(eta.shape)}")
        if self.rank == 0:
            eta = torch.randn_like(sample) if eta is None else eta
            return eta.to(sample.dtype, memory_format=torch.channels_last)
        if eta is None:
            unit_noise = torch.randn(len(sample), self.rank + 1, device=sample.device)
        else:
            # Any rank + 1 elements of eta will do. Smaller maps repeat theirs.
            unit_noise = eta.flatten(1)[:, : self.rank + 1].float()
            if unit_noise.shape[1] <= self.rank:
                unit_noise = unit_noise.repeat(1, self.rank // unit_noise.shape[1] + 1)[:, : self.rank + 1]
        # Exponentials of sums of squares need float32.
        with torch.autocast(sample.device.type, enabled=False):
            drafts = self._drafts(unit_noise, sample, timestep, class_labels)
        drafts = drafts.view(-1, sample.shape[1], self.side, self.side).to(sample.dtype, memory_format=torch.channels_last)
        same = drafts.shape[2:] == sample.shape[2:]
        return drafts if same else F.interpolate(drafts, size=sample.shape[2:], mode="bilinear")

    def on_grid(self, x: torch.Tensor) -> torch.Tensor:
        """Average (B, C, H, W) to the grid: (B, C * side * side), float32."""
        return (x if x.shape[2:] == (self.side, self.side) else F.adaptive_avg_pool2d(x, self.side)).flatten(1).float()

    def _drafts(
        self, unit_noise: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Map unit noise (B * M, rank + 1), whose last column chooses the mode, and x_t (B, C, H, W) to e (B * M, N)."""
        # Each grid element is the mean of pool^2 latent elements, so its noise is s_t / pool.
        x_t, pool = self.on_grid(sample), (sample.shape[2] * sample.shape[3]) ** 0.5 / self.side
        basis, means = self.basis.float(), self.means.float()
        tables = torch.stack((self.alphas_cumprod, self.scale, self.norms))
        alphabar, scale, norm = between(tables, timestep)[..., None]
        a, s = alphabar.sqrt(), (1.0 - alphabar).clamp_min(SMALLEST).sqrt()  # (B, 1), or (1, 1) for a single t
        precision = 1.0 / (alphabar * self.variances + (s / pool) ** 2)  # of u given the mode, (B or 1, rank)
        known = (x_t / norm - a * self.centre) @ basis.T
        prior = self.log_weights[-1:] if class_labels is None else self.log_weights[class_labels]
        responsibilities = shared_responsibilities(prior, means, a * precision * known, alphabar * precision)  # (B, K)

        draws = len(unit_noise) // len(x_t)
        # The two terms of e, per unit of scale: s_t / pool^2 times the offset of the mode's mean, and 1 / pool times the
        # deviation within the mode.
        scale = scale / pool
        mean_factor, noise_factor = scale * (s / pool) * precision, scale * (self.variances * precision).sqrt()
        if len(timestep) > 1:
            mean_factor, noise_factor = repeat(mean_factor, draws), repeat(noise_factor, draws)
        mode = choose(repeat(responsibilities, draws), torch.special.ndtr(unit_noise[:, -1:]))
        offset = mean_factor * (means[mode] - repeat(responsibilities @ means, draws))
        return torch.addcmul(offset, noise_factor, unit_noise[:, :-1]) @ basis


def between(values: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Interpolate values (..., T) at timesteps (B,): (..., B), float32. Some schedulers use non-integer timesteps."""
    below = timestep.floor()
    first, second = (values[..., index.long()].float() for index in (below, timestep.ceil()))
    return first.lerp(second, (timestep - below).float())
