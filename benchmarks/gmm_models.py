"""The networks of gmm_lab.py: SMD for points instead of images, with several independent models trained at once.

Every parameter has a leading axis with one entry for each model (seed). Small networks are bound by overhead, not by
arithmetic, so three take little longer than one. The mixture is that of ldm_smd/models/hypernetwork.py, with a point for a
position.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

TIME_FEATURES = 32
GATE_LAYERS = 2


class StackedLinear(nn.Module):
    """Linear layers y_e = x_e W_e + b_e for every model e: (E, N, inputs) -> (E, N, outputs)."""

    def __init__(self, models: int, inputs: int, outputs: int, zero: bool = False) -> None:
        super().__init__()
        bound = 0.0 if zero else math.sqrt(3.0 / inputs)
        self.weight = nn.Parameter(torch.empty(models, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(models, 1, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class StackedBlock(nn.Module):
    """Residual block h + Linear(silu(Linear(norm(h)))), the identity at initialization."""

    def __init__(self, models: int, width: int) -> None:
        super().__init__()
        self.first = StackedLinear(models, width, width)
        self.second = StackedLinear(models, width, width, zero=True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.second(F.silu(self.first(F.layer_norm(h, h.shape[-1:]))))


class StackedHyperNetwork(nn.Module):
    """Hypernetwork h + Linear_out(W_2 W_1 Linear_in(norm(h))) with W_l = v_l v_l^T / sqrt(width) + softplus(c_l) I, v_l from
    z."""

    def __init__(self, models: int, channels: int, z_channels: int, width: int) -> None:
        super().__init__()
        self.linear_in = StackedLinear(models, channels, width)
        self.linear_v = StackedLinear(models, z_channels, GATE_LAYERS * width)
        self.c = nn.Parameter(torch.full((GATE_LAYERS, models, 1, 1), math.log(math.e - 1.0)))
        self.linear_out = StackedLinear(models, width, channels, zero=True)

    def forward(self, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        y = self.linear_in(F.layer_norm(h, h.shape[-1:]))
        for v, c in zip(self.linear_v(z).chunk(GATE_LAYERS, dim=-1), F.softplus(self.c)):
            y = torch.addcmul(c * y, v, (v * y).sum(dim=-1, keepdim=True) / math.sqrt(y.shape[-1]))
        return h + self.linear_out(y)


class PointDenoiser(nn.Module):
    """E models that predict x_0 of a point from x_t, with one prediction for every draw of eta.

    The trunk reads x_t and t, once for all draws. The identifier makes z from the trunk's features and eta. The head consists
    of hypernetworks and blocks.

    Args:
        models: E.
        dimensions: dimension of the points.
        eta_dimensions: dimension of eta, at least ``dimensions``; 0 for a Gaussian model.
        components: K. With K > 1, the identifier also gets the index of one of K components, drawn with weights that the trunk
            predicts. Each component has a ``centre``, which training initializes at data points (gmm_training.train), because
            components that start at the same point separate slowly.
    """

    def __init__(
        self,
        models: int,
        dimensions: int,
        width: int = 64,
        trunk_blocks: int = 3,
        head_blocks: int = 1,
        eta_dimensions: int = 0,
        components: int = 1,
        z_channels: int = 32,
        hypernetwork_width: int = 32,
    ) -> None:
        super().__init__()
        self.models, self.dimensions = models, dimensions
        self.eta_dimensions, self.components = eta_dimensions, components
        self.start = StackedLinear(models, dimensions + TIME_FEATURES, width)
        self.trunk = nn.ModuleList(StackedBlock(models, width) for _ in range(trunk_blocks))
        self.head = nn.ModuleList(StackedBlock(models, width) for _ in range(head_blocks))
        self.out = StackedLinear(models, width, dimensions, zero=True)
        if self.is_mixture:
            self.identify = StackedLinear(models, width + eta_dimensions, width)
            self.to_z = StackedLinear(models, width, z_channels)
            self.deviation = StackedLinear(models, width, dimensions, zero=True)
            self.hyper = nn.ModuleList(
                StackedHyperNetwork(models, width, z_channels, hypernetwork_width) for _ in range(head_blocks)
            )
        if components > 1:
            self.to_logits = StackedLinear(models, width, components, zero=True)
            self.likeness = StackedLinear(models, width, 1, zero=True)
            self.component = nn.Parameter(torch.randn(models, components, width))
            self.centre = nn.Parameter(torch.zeros(models, components, dimensions))

    @property
    def is_mixture(self) -> bool:
        return self.eta_dimensions > 0

    def displacement_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that move a component away from its initial centre."""
        return [*self.out.parameters(), *self.deviation.parameters(), self.centre] if self.components > 1 else []

    def features(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Map x_t (E, N, D) and time (E, N) in [0, 1] to features (E, N, width)."""
        frequencies = torch.exp(-math.log(10_000) * torch.arange(TIME_FEATURES // 2) / (TIME_FEATURES // 2))
        angles = 1000 * time[..., None] * frequencies
        h = self.start(torch.cat((x_t, angles.sin(), angles.cos()), dim=-1))
        for block in self.trunk:
            h = block(h)
        return h

    def log_weights(self, x_t: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the log weights of the components, (E, N, K): log w_k = b_k(features) + c(features) <x_t, centre_k> + const.

        They have this form if the data are modes of one variance sigma^2 around the centres, with
        c = a_t / (a_t^2 sigma^2 + s_t^2).
        """
        likeness = self.likeness(features) * (x_t @ self.centre.mT)
        return (self.to_logits(features) + likeness).log_softmax(dim=-1)

    def predict(
        self, features: torch.Tensor, eta: torch.Tensor | None = None, component: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict x_0 for every draw: features (E, N, width), eta (E, N * M, .), component (E, N * M) -> (E, N * M, D)."""
        h = features
        if self.is_mixture:
            h = repeat(h, eta.shape[1] // h.shape[1])
            z = self.identify(torch.cat((h, eta), dim=-1))
            if self.components > 1:
                z = z + self.component.gather(1, component[..., None].expand(-1, -1, z.shape[-1]))
            z = self.to_z(F.silu(z))
        for index, block in enumerate(self.head):
            h = block(self.hyper[index](h, z) if self.is_mixture else h)
        x0 = self.out(h)
        if self.is_mixture:
            # The Gaussian shape of a mode: eta would lose it in the norms and nonlinearities.
            x0 = torch.addcmul(x0, self.deviation(h), eta[..., : self.dimensions])
        if self.components > 1:
            x0 = x0 + self.centre.gather(1, component[..., None].expand_as(x0))
        return x0

    def draw(self, x_t: torch.Tensor, time: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
        """Draw x_0 ``draws`` times for every point: (E, N * draws, D). All draws of a Gaussian model are equal."""
        h = self.features(x_t, time)
        if not self.is_mixture:
            return repeat(self.predict(h), draws)
        models, points, _ = x_t.shape
        eta = torch.randn(models, points * draws, self.eta_dimensions, generator=generator)
        component = None
        if self.components > 1:
            weights = self.log_weights(x_t, h).exp().flatten(0, 1)
            component = torch.multinomial(weights, draws, replacement=True, generator=generator).view(models, -1)
        return self.predict(h, eta, component)


def repeat(x: torch.Tensor, draws: int) -> torch.Tensor:
    """Repeat every point in consecutive rows: (E, N, ...) -> (E, N * draws, ...)."""
    return x if draws == 1 else x.repeat_interleave(draws, dim=1)


def parameters_per_model(model: PointDenoiser) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) // model.models
