"""Consistency training of a mixture, then distillation: it starts from a network that already makes images in one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .consistency import ECTSettings, consistency_loss
from .mixtures import DistillationSettings, PosteriorDistillation
from .network import BlurredTime, Denoiser, Start, levels


@dataclass
class ConsistencyThenSettings(DistillationSettings):
    adversarial: float = 0.3
    consistency_first: float = 0.5
    """Fraction of the images, at the start, that are used for consistency training."""
    consistency_rate: float = 3e-4


class ConsistencyThenDistillation(PosteriorDistillation):
    """ECT for a part of the images, then distillation. The noise is white: fitted noise would be added to the predictions, also
    at the largest noise levels, where consistency training needs none.

    Consistency training ignores eta: the noise in x_t decides about the image. Distillation keeps this above
    ``marginal_above``.
    """

    Settings = ConsistencyThenSettings

    def __init__(self, start: Start, settings: ConsistencyThenSettings) -> None:
        super().__init__(start, settings)
        channels = self.model.config.block_out_channels[0]
        self.model.time_proj = BlurredTime(self.model.time_proj, channels)  # r may be nearer to t than a timestep
        self.timestep = Denoiser(start.unet, start.alphas_cumprod).timestep
        self.consistency = ECTSettings(learning_rate=settings.consistency_rate)
        self.add("first", self.model, torch.optim.RAdam(self.model.parameters(), lr=settings.consistency_rate))

    @property
    def first(self) -> float:
        return self.settings.consistency_first

    def first_step(
        self, x0: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, rate: float
    ) -> dict[str, torch.Tensor]:
        eta = torch.randn(x0.shape, generator=generator, device=x0.device)  # the same at both noise levels

        def clean(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            a, s = levels(sigma)
            return a * x - s * self.model(x, self.timestep(sigma), labels, eta=eta, return_dict=False)[0]

        loss = consistency_loss(clean, x0, self.consistency, self.progress / self.first, generator)
        self.descend("first", loss, rate)
        return {"loss": loss.detach()}
