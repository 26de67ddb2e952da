"""LatentGaussians: the distribution of the latents as one Gaussian for each class, or as many that share a covariance."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from ..diffusion.gaussian import choose, shared_responsibilities


class LatentGaussians(ModelMixin, ConfigMixin):
    """n Gaussians N(m_i, U_b diag(lam_b) U_b^T + tail_b (I - U_b U_b^T)) of normalised latents, b the basis of i, and their
    weights for every class and for no class. Under the probability-flow ODE each moves in closed form (arXiv 2412.09726), and
    with it a diffusion model's samples for as long as the noise hides all but mean and covariance:

        x_s = a_s m + U diag( ((a_s^2 lam + s_s^2) / (a_t^2 lam + s_t^2))^(1/2) ) U^T (x_t - a_t m),    U's complement alike.

    Args:
        channels, height, width: of the latents.
        rank: eigenvectors kept, R.
        count: n. With ``shared`` false it is one for each class and a last one for no class.
        shared: one covariance for all: a Gaussian mixture, of which ``transport`` draws a component from its posterior.
        num_classes: None for no classes.
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
        rows, numbers, bases = (num_classes or 0) + 1, channels * height * width, 1 if shared else count
        if not shared and count != rows:
            raise ValueError(f"count: expected one for each class and one for all, {rows}, found {count}")
        self.register_buffer("log_weights", torch.full((rows, count), -torch.inf))
        self.register_buffer("means", torch.zeros(count, numbers))
        self.register_buffer("vectors", torch.zeros(bases, rank, numbers))
        self.register_buffer("variances", torch.ones(bases, rank))
        self.register_buffer("tails", torch.ones(bases))

    def transport(
        self,
        x_t: torch.Tensor,
        t: tuple[float, float],
        s: tuple[float, float],
        class_labels: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x_t (B, C, H, W) at signal and noise t = (a_t, s_t) -> x_s at s = (a_s, s_s), in float32 or better.

        Args:
            class_labels: (B,); None for no class.
            uniform: (B,) numbers from [0, 1) that choose the components of a mixture; not read otherwise.
        """
        shape = (self.config.channels, self.config.height, self.config.width)
        if tuple(x_t.shape[1:]) != shape:
            raise ValueError(
                f"x_t: expected (B, {', '.join(map(str, shape))}), the latents of these Gaussians, found {tuple(x_t.shape)}; "
                "tools/fit_gaussian.py fits others"
            )
        (a_t, s_t), (a_s, s_s) = t, s
        x = x_t.flatten(1).to(torch.promote_types(x_t.dtype, torch.float32))
        which = torch.full((len(x),), len(self.log_weights) - 1, device=x.device) if class_labels is None else class_labels
        basis = torch.zeros_like(which) if self.config.shared else which
        if self.config.shared:
            which = self._choose(x, t, which, uniform)
        means, vectors = self.means.to(x.dtype)[which], self.vectors.to(x.dtype)
        variances, tails = self.variances.to(x.dtype)[basis], self.tails.to(x.dtype)[basis, None]

        def stretch(variance: torch.Tensor) -> torch.Tensor:
            return ((a_s**2 * variance + s_s**2) / (a_t**2 * variance + s_t**2)).sqrt()

        apart = x - a_t * means
        if self.config.shared:
            inside = apart @ vectors[0].T
            turned = ((stretch(variances) - stretch(tails)) * inside) @ vectors[0]
        else:
            inside = torch.einsum("bd,brd->br", apart, vectors[basis])
            turned = torch.einsum("br,brd->bd", (stretch(variances) - stretch(tails)) * inside, vectors[basis])
        return (a_s * means + turned + stretch(tails) * apart).view_as(x_t)

    def _choose(self, x: torch.Tensor, t: tuple[float, float], row: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
        """A component for every row of x (B, D), drawn from r_i ~ w_i N(x; a m_i, a^2 S + s^2 I); the means differ in the
        leading directions of S alone."""
        if uniform is None:
            raise ValueError("uniform: expected a number for each sample, to choose among components, found None")
        a, s = t
        vectors, means = self.vectors[0].to(x.dtype), self.means.to(x.dtype)
        precision = 1.0 / (a**2 * self.variances[0].to(x.dtype) + s**2)
        apart = x @ vectors.T
        log_weights = self.log_weights.to(x.dtype)[row]
        shares = shared_responsibilities(log_weights, means @ vectors.T, a * precision * apart, a**2 * precision)
        return choose(shares, uniform.to(x.dtype)[:, None])
