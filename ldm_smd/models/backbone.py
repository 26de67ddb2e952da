"""Backbone: base class of denoisers with a mixture, with their forward pass and the loading of former model folders."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from .mixture import Draws, Mixture


@dataclass
class Trunk:
    """Output of a trunk, per image: the input of g_xi and of the tail.

    Attributes:
        features: feature map that g_xi reads and the tail continues from, (B, C, h, w).
        embedding: embedding of timestep and conditions, for g_xi and the gate, (B, embedding_dim).
        kept: anything else that the tail of the same network needs.
    """

    features: torch.Tensor
    embedding: torch.Tensor
    kept: Any


class Backbone(ModelMixin, ConfigMixin):
    """A denoiser in two parts: ``trunk`` runs once per image, ``tail`` once per draw. The tail calls its ``Draws`` wherever a
    draw enters. ``mixture`` is None for a Gaussian model."""

    mixture: Mixture | None

    @abstractmethod
    def trunk(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, image_embeds: torch.Tensor | None
    ) -> Trunk:
        """Map x_t (B, C, H, W), t (B,) or (1,), labels (B,) or None and embeddings (B, D) or None to the input of the tail."""

    @abstractmethod
    def tail(self, trunk: Trunk, draws: Draws) -> torch.Tensor:
        """Predict for every draw, (B * M, C, H, W)."""

    @property
    def is_mixture(self) -> bool:
        return self.mixture is not None

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        eta: torch.Tensor | None = None,
        return_dict: bool = True,
        image_embeds: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict for every image and every draw.

        Args:
            sample: x_t, (B, C, H, W).
            timestep: a number, or (B,).
            class_labels: (B,) integers, ``num_classes`` for the null class; None is the null class for all rows.
            eta: unit normal (B * M, C, H, W), the M draws of an image in consecutive rows; None draws one per image.
                Ignored by a Gaussian model.
            image_embeds: OpenCLIP embeddings (B, D) of unit length. A row of zeros means none; so does None, for all rows.

        Returns:
            The prediction (B * M, C, H, W), rows as in ``eta``; (B, C, H, W) for a Gaussian model.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # a single number is not expanded, to save work
        trunk = self.trunk(sample, timestep, class_labels, image_embeds)
        if self.mixture is None:
            prediction = self.tail(trunk, Draws())
        else:
            draws = self.mixture.draw(eta, sample, timestep, class_labels, trunk.features, trunk.embedding)
            prediction = self.mixture.gated(self.tail(trunk, draws), draws, trunk.embedding)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    @classmethod
    def from_config(cls, config: dict, **options: Any) -> Backbone:
        """Make a model as diffusers does; also accepts configs with former names."""
        return super().from_config(current_config(config), **options)

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Rename former weights. diffusers calls this between reading a state dict and checking its names."""
        for name in list(state_dict):
            state_dict[current_name(name)] = state_dict.pop(name)
        if "mixture.noise.alphas_cumprod" in state_dict:  # from before paths other than variance-preserving ones
            state_dict.setdefault("mixture.noise.norms", torch.ones_like(state_dict["mixture.noise.alphas_cumprod"]))


# Former names of weights and optimizer states, from when the mixture's parts were entries of a dictionary "hyper".
FORMER_NAMES = (
    (re.compile(r"^identifier\."), "mixture.identifier."),
    (re.compile(r"^hyper\.(noise|gate|modulation)\."), r"mixture.\1."),
    (re.compile(r"^hyper\.draft\."), "mixture.noise_skip."),
    (re.compile(r"^hyper\.embedding\."), "mixture.modulation."),
    (re.compile(r"^hyper\."), "mixture.hypernetworks."),
)


def current_name(name: str) -> str:
    """Return the current name of a weight that may have a former one."""
    for pattern, current in FORMER_NAMES:
        if pattern.match(name):
            return pattern.sub(current, name)
    return name


def current_config(config: dict) -> dict:
    """Return a model's config with current names."""
    return {"z_channels" if name == "latent_channels" else name: value for name, value in config.items()}
