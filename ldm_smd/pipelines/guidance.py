"""Conditions of samples, and guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import ModelMixin, SchedulerMixin

from ..models.denoiser import embedding_dimensions, null_labels, num_classes, predict
from ..models.moments import MomentHeads
from ..schedulers.conversion import path_of


class Conditions(NamedTuple):
    """Class labels (B,) and image embeddings (B, D), None if not given."""

    labels: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None

    def with_null(self, unet: ModelMixin) -> Conditions:
        """Return these B rows, followed by B rows with the null class and the zero embedding."""
        labels, embeds = self
        null = None if labels is None else null_labels(unet, labels)
        return Conditions(joined(labels, null), joined(embeds, None if embeds is None else torch.zeros_like(embeds)))

    def repeated(self, count: int) -> Conditions:
        """Return each row ``count`` times, next to each other."""
        return Conditions(*(None if given is None else given.repeat_interleave(count, dim=0) for given in self))


def read_conditions(
    unet: ModelMixin, class_labels: Sequence[int] | torch.Tensor | None, image_embeds: torch.Tensor | None, device: torch.device
) -> Conditions:
    """Return the conditions on the device. Raises ValueError if they do not fit the denoiser or each other."""
    labels = None
    if class_labels is not None:
        classes = num_classes(unet)
        if classes is None:
            raise ValueError("class_labels: expected None, this model is unconditional")
        try:
            labels = torch.as_tensor(class_labels)
            if labels.is_floating_point() and labels.numel():
                raise TypeError("floating-point numbers")
            labels = labels.long()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"class_labels: expected class numbers or names, found {class_labels!r}") from error
        if labels.ndim != 1:
            raise ValueError(f"class_labels: expected a class number for each image, such as [0, 1], found {class_labels!r}")
        if not labels.numel():
            raise ValueError("class_labels: expected at least one, found none")
        if not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
            raise ValueError(f"class_labels: expected 0 to {classes} ({classes} is the null class), found {labels.tolist()}")
        labels = labels.to(device)
    if image_embeds is not None:
        dimensions = embedding_dimensions(unet)
        if dimensions is None:
            raise ValueError("image_embeds: expected None, this model is not conditioned on embeddings")
        rows = len(image_embeds) if labels is None else len(labels)
        if image_embeds.shape != (rows, dimensions):
            raise ValueError(f"image_embeds: expected ({rows}, {dimensions}), found {tuple(image_embeds.shape)}")
        image_embeds = image_embeds.to(device, unet.dtype)
    return Conditions(labels, image_embeds)


def guided_prediction(
    unet: ModelMixin,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    conditions: Conditions,
    eta: torch.Tensor | None,
    scale: float,
    guide: ModelMixin | None = None,
    moments: MomentHeads | None = None,
) -> torch.Tensor:
    """Predict with guidance of scale w, with the same eta for both predictions:

        other + w (own - other)

    ``other`` is the prediction of ``guide`` or, without a guide, of ``unet`` for the null class and no embedding. With
    ``moments``, the moments follow as extra channels; guidance changes the mean only.
    """

    def evaluate(x_t: torch.Tensor, timestep: torch.Tensor, given: Conditions, eta: torch.Tensor | None) -> torch.Tensor:
        if moments is not None:
            return moments.predict(unet, x_t, timestep, given.labels, given.image_embeds)
        return predict(unet, x_t, timestep, given.labels, eta, given.image_embeds)

    if scale == 1.0 or (guide is None and all(given is None for given in conditions)):
        return evaluate(x_t, timestep, conditions, eta)
    if guide is not None:
        own = evaluate(x_t, timestep, conditions, eta)
        embeds = conditions.image_embeds
        embeds = None if embeds is None else embeds.to(guide.dtype)
        other = predict(guide, x_t.to(guide.dtype), timestep, conditions.labels, eta, embeds)
    else:
        twice = timestep if timestep.numel() == 1 else torch.cat((timestep, timestep))
        own, other = evaluate(torch.cat((x_t, x_t)), twice, conditions.with_null(unet), joined(eta, eta)).chunk(2)
    own, other, channels = own.float(), other.float(), x_t.shape[1]
    return torch.cat((other[:, :channels].lerp(own[:, :channels], scale), own[:, channels:]), dim=1)


def guided_steps(scheduler: SchedulerMixin, timesteps: torch.Tensor, interval: tuple[float, float]) -> list[bool]:
    """Return for each timestep whether its noise level sigma = s_t / a_t is in the interval."""
    if interval == (0.0, math.inf):
        return [True] * len(timesteps)
    a, s = path_of(scheduler).signal_and_noise(timesteps, timesteps)
    sigma = s / a
    return ((sigma >= interval[0]) & (sigma <= interval[1])).tolist()


def joined(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    return None if first is None or second is None else torch.cat((first, second))
