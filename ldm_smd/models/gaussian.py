"""LatentGaussians: distribution of the latents, as a Gaussian per class or a mixture with a shared covariance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..diffusion.gaussian_mixture import choose, shared_responsibilities


class LatentGaussians(ModelMixin, ConfigMixin):
    """n Gaussians N(m_i, U_b diag(lam_b) U_b^T + tail_b (I - U_b U_b^T)) of normalised latents, where b is the basis of i, with
    weights for every class and for no class.

    Under the probability flow ODE a Gaussian has a closed-form solution (arXiv 2412.09726). It also describes the samples of a
    diffusion model while the noise hides everything but mean and covariance:

        x_s = a_s m + U diag( ((a_s^2 lam + s_s^2) / (a_t^2 lam + s_t^2))^(1/2) ) U^T (x_t - a_t m),

    and the same for the complement of U.

    Args:
        channels, height, width: shape of the latents.
        rank: number of eigenvectors, R.
        count: n. Without ``shared``, one per class and a last one for no class.
        shared: use one covariance for all. This is a Gaussian mixture; ``transport`` draws a component from its posterior.
        num_classes: number of classes, or None.
    """

    @register_to_config
    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        rank: int,
        count: int = 1,
        shared: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        rows, elements, bases = (num_classes or 0) + 1, channels * height * width, 1 if shared else count
        if not shared and count != rows:
            raise ValueError(f"count: expected one for each class and one for all, {rows}, found {count}")
        self.register_buffer("log_weights", torch.full((rows, count), -torch.inf))
        self.register_buffer("means", torch.zeros(count, elements))
        self.register_buffer("vectors", torch.zeros(bases, rank, elements))
        self.register_buffer("variances", torch.ones(bases, rank))
        self.register_buffer("tails", torch.ones(bases))

    @apply_forward_hook
    def transport(
        self,
        x_t: torch.Tensor,
        t: tuple[float, float],
        s: tuple[float, float],
        class_labels: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Transport x_t (B, C, H, W) from signal and noise t = (a_t, s_t) to x_s at s = (a_s, s_s), in float32 or better.

        Args:
            class_labels: (B,), or None for no class.
            uniform: (B,) in [0, 1), to choose the components of a mixture; ignored otherwise.
        """
        x, row = self._rows(x_t, class_labels)
        which = row
        if self.config.shared:
            if uniform is None:
                raise ValueError("uniform: expected a number per sample, to choose a component, found None")
            which = choose(self._responsibilities(x, t, row), uniform.to(x.dtype)[:, None])
        (a_t, s_t), (a_s, s_s) = t, s
        means = self.means.to(x.dtype)[which]
        moved = self._scale(x - a_t * means, row, lambda lam: ((a_s**2 * lam + s_s**2) / (a_t**2 * lam + s_t**2)).sqrt())
        return (a_s * means + moved).view_as(x_t)

    @apply_forward_hook
    def expected_x0(self, x_t: torch.Tensor, t: tuple[float, float], class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return E[x_0 | x_t], (B, C, H, W), for latents from these Gaussians. With the responsibilities r_i,

            E[x_0 | x_t] = mbar + U diag( a lam / (a^2 lam + s^2) ) U^T (x_t - a mbar),    mbar = sum_i r_i m_i,

        and the score is (a E[x_0 | x_t] - x_t) / s^2. Arguments as in ``transport``.
        """
        x, row = self._rows(x_t, class_labels)
        means = self.means.to(x.dtype)
        means = self._responsibilities(x, t, row) @ means if self.config.shared else means[row]
        a, s = t
        return (means + self._scale(x - a * means, row, lambda lam: a * lam / (a**2 * lam + s**2))).view_as(x_t)

    def _rows(self, x_t: torch.Tensor, class_labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x_t as (B, D), in float32 or better, and the rows of ``log_weights``, (B,)."""
        shape = (self.config.channels, self.config.height, self.config.width)
        if tuple(x_t.shape[1:]) != shape:
            raise ValueError(
                f"x_t: expected (B, {', '.join(map(str, shape))}), the latents of these Gaussians, found {tuple(x_t.shape)}; "
                "fit them with tools/fit_gaussian.py"
            )
        x = x_t.flatten(1).to(torch.promote_types(x_t.dtype, torch.float32))
        return x, torch.full((len(x),), len(self.log_weights) - 1, device=x.device) if class_labels is None else class_labels

    def _scale(self, x: torch.Tensor, row: torch.Tensor, factor: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Scale x (B, D) in each direction by ``factor``, a function of the variance there."""
        basis = torch.zeros_like(row) if self.config.shared else row
        vectors = self.vectors.to(x.dtype)
        tail_factor = factor(self.tails.to(x.dtype)[basis, None])
        excess = factor(self.variances.to(x.dtype)[basis]) - tail_factor
        if self.config.shared:
            in_basis = (excess * (x @ vectors[0].T)) @ vectors[0]
        else:
            in_basis = torch.einsum("br,brd->bd", excess * torch.einsum("bd,brd->br", x, vectors[basis]), vectors[basis])
        return in_basis + tail_factor * x

    def _responsibilities(self, x: torch.Tensor, t: tuple[float, float], row: torch.Tensor) -> torch.Tensor:
        """r_i ~ w_i N(x; a m_i, a^2 S + s^2 I), (B, n). The means differ only in the leading directions of S."""
        a, s = t
        vectors, means = self.vectors[0].to(x.dtype), self.means.to(x.dtype)
        precision = 1.0 / (a**2 * self.variances[0].to(x.dtype) + s**2)
        log_weights = self.log_weights.to(x.dtype)[row]
        return shared_responsibilities(log_weights, means @ vectors.T, a * precision * (x @ vectors.T), a**2 * precision)
