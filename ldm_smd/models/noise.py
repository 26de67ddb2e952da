"""The random numbers a mixture reads, with the distribution of what is left to choose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..diffusion.gaussian_mixture import choose, shared_responsibilities
from .blocks import repeat

GRID = 8
"""Side of the grid on which the distribution of the latents is known: 64 elements a channel, whatever the latents' size."""

SMALLEST = 1e-4


class PosteriorNoise(nn.Module):
    """White eta -> e, a draw of what x_t leaves open about the leading principal components of the latents.

    The components c of x_0, ``rank`` of them, are taken to be from a Gaussian mixture whose modes share a covariance and have
    weights w_ky that are known for every class y:

        p(c | y) = sum_k w_ky N(c; m_k, diag(v)).

    Then q(c | x_t, y) is a mixture in closed form. With u the components of x_t = a_t x_0 + s_t eps,

        r_k ~ w_ky N(u; a_t m_k, a_t^2 v + s_t^2),    k drawn from r,    mbar = sum_k r_k m_k,
        e = s_t (m_k - mbar) / (a_t^2 v + s_t^2) + (v / (a_t^2 v + s_t^2))^(1/2) eta,

    and E[c | x_t] + s_t e is a draw of q(c | x_t). Back among the latents it is a draft of the picture in whose layout and
    colours all positions agree, whereas the paper's i.i.d. noise lets each pick a mode independently; what few components
    cannot say, texture and edges, is the same for every draw of a step and left to the steps after it. With one mode it is the
    Gaussian approximation of the score (arXiv 2412.09726), Cov(e) = Sigma (a_t^2 Sigma + s_t^2)^-1.

    e is returned in the space of the network's prediction: added to the Gaussian model's, it makes a mixture of it.

    Any Gaussian path is a variance-preserving one, a_t^2 + s_t^2 = 1, times a norm: x_t, and e, are divided by it.

    The components are those of latents averaged to GRID x GRID positions. Before ``fit_posterior_noise``, or loaded weights,
    they are random directions with unit variances, at t without signal, for v-prediction.

    Args:
        channels, side: of the latents.
        rank: principal components; 0 for e = eta, as in the SMD paper.
        modes: K.
        num_classes: None for an unconditional model.
        timesteps: t = 0, 1, .. to the last of the path.
    """

    basis: torch.Tensor
    centre: torch.Tensor
    log_weights: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor
    alphas_cumprod: torch.Tensor
    scale: torch.Tensor
    norms: torch.Tensor

    def __init__(self, channels: int, side: int, rank: int, modes: int, num_classes: int | None, timesteps: int) -> None:
        super().__init__()
        self.side = min(GRID, side)
        elements = channels * self.side**2
        self.rank = rank = min(rank, elements - 1)
        basis = torch.empty(rank, elements, dtype=torch.float32)  # where a model is loaded in half precision too
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
        """How much of e a new mixture adds to the Gaussian model's prediction: all of a draft, nothing of white noise."""
        return 1.0 if self.rank else 0.0

    @property
    def is_fitted(self) -> bool:
        return self.rank == 0 or bool(self.alphas_cumprod.any())

    @torch.no_grad()
    def forward(
        self, eta: torch.Tensor | None, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """eta (B * M, C, H, W), or None for one draw each, x_t (B, C, H, W), timestep (B,) or (1,), class_labels (B,) -> e, as
        eta, channels last."""
        if eta is not None and (eta.shape[1:] != sample.shape[1:] or len(eta) == 0 or len(eta) % len(sample)):
            wanted = f"(B * M, {', '.join(map(str, sample.shape[1:]))}) with B = {len(sample)}"
            raise ValueError(f"eta: expected {wanted}, found {tuple(eta.shape)}")
        if self.rank == 0:
            eta = torch.randn_like(sample) if eta is None else eta
            return eta.contiguous(memory_format=torch.channels_last)
        if eta is None:
            unit_noise = torch.randn(len(sample), self.rank + 1, device=sample.device)
        else:
            # Any rank + 1 elements of eta are as good as any others; smaller maps repeat theirs.
            unit_noise = eta.flatten(1)[:, : self.rank + 1].float()
            if unit_noise.shape[1] <= self.rank:
                unit_noise = unit_noise.repeat(1, self.rank // unit_noise.shape[1] + 1)[:, : self.rank + 1]
        # Exponents of sums of squares: not for half precision.
        with torch.autocast(sample.device.type, enabled=False):
            drafts = self._drafts(unit_noise, sample, timestep, class_labels)
        drafts = drafts.view(-1, sample.shape[1], self.side, self.side).to(sample.dtype, memory_format=torch.channels_last)
        same = drafts.shape[2:] == sample.shape[2:]
        return drafts if same else F.interpolate(drafts, size=sample.shape[2:], mode="bilinear")

    def on_grid(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C * side * side), float32."""
        return (x if x.shape[2:] == (self.side, self.side) else F.adaptive_avg_pool2d(x, self.side)).flatten(1).float()

    def _drafts(
        self, unit_noise: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """unit noise (B * M, rank + 1), the last column to choose the mode, x_t (B, C, H, W) -> e (B * M, N) on the grid."""
        # On the grid the noise of x_t is s_t / cell: each element is the mean of cell^2.
        x_t, cell = self.on_grid(sample), (sample.shape[2] * sample.shape[3]) ** 0.5 / self.side
        basis, means = self.basis.float(), self.means.float()
        tables = torch.stack((self.alphas_cumprod, self.scale, self.norms))
        alphabar, scale, norm = between(tables, timestep)[..., None]
        a, s = alphabar.sqrt(), (1.0 - alphabar).clamp_min(SMALLEST).sqrt()  # (B, 1), or (1, 1) where all have one t
        precision = 1.0 / (alphabar * self.variances + (s / cell) ** 2)  # of u given the mode, (B or 1, rank)
        known = (x_t / norm - a * self.centre) @ basis.T
        prior = self.log_weights[-1:] if class_labels is None else self.log_weights[class_labels]
        responsibilities = shared_responsibilities(prior, means, a * precision * known, alphabar * precision)  # (B, K)

        draws = len(unit_noise) // len(x_t)
        # Both factors of e for one unit of scale: s_t / cell^2 of the means apart, 1 / cell of the deviation inside a mode.
        scale = scale / cell
        apart, inside = scale * (s / cell) * precision, scale * (self.variances * precision).sqrt()
        if len(timestep) > 1:
            apart, inside = repeat(apart, draws), repeat(inside, draws)
        mode = choose(repeat(responsibilities, draws), torch.special.ndtr(unit_noise[:, -1:]))
        moved = apart * (means[mode] - repeat(responsibilities @ means, draws))
        return torch.addcmul(moved, inside, unit_noise[:, :-1]) @ basis


def between(values: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """values (..., T) at timesteps (B,) -> (..., B), float32; some schedulers' timesteps lie between two of training."""
    below = timestep.floor()
    first, second = (values[..., index.long()].float() for index in (below, timestep.ceil()))
    return first.lerp(second, (timestep - below).float())
