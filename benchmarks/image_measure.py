"""Measures of generated images, in the features of two networks that were trained differently, and copies of training images.

A claim about image quality must hold in both networks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from nearest import NearestImage

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.device import pick_device
from ldm_smd.evaluation.distances import BLOCK, FeatureSet, bootstrap_deviation, distances, frechet_distance
from ldm_smd.evaluation.features import Extractor, load_extractor
from ldm_smd.evaluation.reconstruction import reconstruct
from ldm_smd.schema import check

DIGITS = 5
MIN_DISTANCE = 1e-9


@dataclass
class MeasureConfig:
    """Reference images and measures."""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    """Training images of the models."""
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Real images that were used neither for training nor for choosing a checkpoint."""
    features: list[str] = field(default_factory=lambda: ["checkpoints/classifier", "checkpoints/features-selfsupervised"])
    """Feature networks, as in tools/evaluate.py."""
    reference: int = 10_000
    """Maximum number of training images to compare with. The nearest image is searched among all."""
    resampled: int = 2000
    """Number of training images to resample for comparison, best equal to that of the samples."""
    bootstrap: int = 200
    """Bootstrap rounds. The estimated deviation is then uncertain by 5 %, and by 24 % with ten rounds."""
    near: float = 0.1
    """A sample is a copy if a training image is within this root mean square distance over colours and pixels in [0, 1]."""

    def __post_init__(self) -> None:
        check(len(set(self.features)) == len(self.features) > 0, "features", "different networks", self.features)
        for key in ("reference", "resampled", "bootstrap"):
            check(getattr(self, key) >= 2, key, "at least 2", getattr(self, key))


class NetworkMeasure:
    """Measures in the features of one network.

    Args:
        training: all training images, uint8 (N, 3, H, W).
        chosen: rows of ``training`` that samples are compared with.
        reconstructed: those rows, encoded and decoded.
    """

    def __init__(
        self,
        extractor: Extractor,
        training: torch.Tensor,
        held_out: torch.Tensor,
        chosen: torch.Tensor,
        reconstructed: torch.Tensor | None = None,
    ) -> None:
        self.extractor = extractor
        self.reconstructed = None if reconstructed is None else FeatureSet(extractor(reconstructed))
        self.training = FeatureSet(extractor(training[chosen], description=extractor.name))
        self.held_out = FeatureSet(extractor(held_out))
        self.new_distance = self._to_nearest(self.held_out.features)

    def __call__(self, features: torch.Tensor, rounds: int, held_out: bool = True) -> dict[str, float]:
        """Return the measures of features (N, D)."""
        found = distances(features, self.training, self.extractor.unit_length, rounds)
        if held_out:
            found["frechet_held_out"] = frechet_distance(features, self.held_out)
            found["frechet_held_out_sd"] = bootstrap_deviation(frechet_distance, features, self.held_out, rounds)
        if self.reconstructed is not None:
            found["frechet_reconstructed"] = frechet_distance(features, self.reconstructed)
            found["frechet_reconstructed_sd"] = bootstrap_deviation(frechet_distance, features, self.reconstructed, rounds)
        return rounded(found | {"nearest": self._to_nearest(features) / max(self.new_distance, MIN_DISTANCE)})

    def _to_nearest(self, features: torch.Tensor) -> float:
        """Return the median distance to the nearest training image."""
        nearest = [torch.cdist(rows, self.training.features).min(dim=1).values for rows in features.split(BLOCK)]
        return float(torch.cat(nearest).median())


class ImageMeasure:
    """Measures of sets of images in comparison with training and held-out images. Features of those are computed once.

    Choosing among checkpoints, settings or schedulers by the reported numbers would make these optimistic. So choose by neither
    the held-out images nor the reported samples. A validation set taken from the training images would be small, and missing in
    training. Instead, choose by ``choice``, on samples of other seeds with the labels of training images (``labels``). It uses
    training images only, and rejects models that reproduce them: the fraction of copies must not be significantly above the
    fraction of training images that have another training image as near. Then report ``measure`` on new seeds, whose
    ``frechet_held_out`` has influenced no choice.

    Two limits remain. A choice can favour samples close to training images that are no copies. And the test is lenient where
    many training images are alike: half of the emoji have another one as near, but only an eighth of the held-out ones, which
    were held out by whole groups. So report ``frechet_held_out`` and ``copies`` beside ``frechet``.

    A denoiser of latents cannot be better than its autoencoder, whose errors are part of every distance to real images. With an
    ``autoencoder``, ``frechet_reconstructed`` is the distance to the training images that it has encoded and decoded. That is
    about the denoiser alone.

    Attributes:
        reconstructed_floor: with an ``autoencoder``, measures of the held-out images that it has encoded and decoded.
        floor: measures of the held-out images: those of samples as good as unseen real images, except for the number of images
            (a Frechet distance is larger for fewer images).
        training: measures of resampled training images: those of a model that reproduces them. Its ``frechet_held_out`` is the
            smallest that can be expected of a model of these training images.
    """

    def __init__(self, config: MeasureConfig, device: str = "auto", autoencoder: FrozenAutoencoder | None = None) -> None:
        self.config, self.device, self._autoencoder = config, pick_device(device), autoencoder
        training, labels, _ = load_pixels(config.images)
        held_out, held_out_labels, _ = load_pixels(config.held_out)
        self._labels, self._held_out_labels = labels, held_out_labels
        chosen = torch.randperm(len(training), generator=seeded(0))[: config.reference]
        decoded = None if autoencoder is None else reconstruct(autoencoder, training[chosen])
        self.networks = [
            NetworkMeasure(load_extractor(name, device), training, held_out, chosen, decoded) for name in config.features
        ]
        self._nearest = NearestImage(training, self.device)
        self._new_distance = float(self._nearest(held_out).median())
        self._chosen, self._training = chosen, training
        self._held_out = held_out

    @cached_property
    def floor(self) -> dict:
        return self._measured(self._held_out, [network.held_out.features for network in self.networks], held_out=False)

    @cached_property
    def reconstructed_floor(self) -> dict:
        assert self._autoencoder is not None
        return self.measure(reconstruct(self._autoencoder, self._held_out[: self.config.resampled]))

    @cached_property
    def training(self) -> dict:
        drawn = torch.randint(len(self._chosen), (self.config.resampled,), generator=seeded(1))
        again = [network.training.features[drawn] for network in self.networks]
        return self._measured(self._training[self._chosen[drawn]], again)

    @cached_property
    def _copies_among_training(self) -> float:
        distances = self._nearest(self._training[self._chosen[: self.config.resampled]], exclude_self=True)
        return float((distances <= self.config.near).double().mean())

    def measure(self, pixels: torch.Tensor) -> dict:
        """Measure images, uint8 (N, 3, H, W).

        Returns:
            ``pictures``: the number of images. ``copies``: the fraction of them within ``near`` of a training image.
            ``nearest_pixels``: their median distance to the nearest training image, relative to that of held-out images. And
            under ``features``, for each network by name:

            * ``frechet`` and ``kid`` to the training images, with bootstrap standard deviations ``_sd``;
            * ``precision``, ``recall``, ``density`` and ``coverage`` with regard to the training images;
            * ``frechet_held_out``: the Frechet distance to the held-out images, with its deviation;
            * with an autoencoder, ``frechet_reconstructed``: the same to the training images that were encoded and decoded;
            * ``nearest``: as ``nearest_pixels``, but in feature space. It is close to 0 if training images are reproduced, and
              1 if samples are as new as images that were not trained on.
        """
        return self._measured(pixels, [network.extractor(pixels) for network in self.networks])

    def choice(self, pixels: torch.Tensor) -> float:
        """Return the criterion to choose models by; lower is better.

        It is the mean over networks of the log Frechet distance to the training images, which gives all networks the same
        weight, or infinity if training images are reproduced.
        """
        allowed = self._copies_among_training
        allowed += 2 * math.sqrt(max(allowed * (1 - allowed), 1 / len(pixels)) / len(pixels))
        if self._pixel_measures(pixels)["copies"] > allowed:
            return math.inf
        found = [frechet_distance(network.extractor(pixels), network.training) for network in self.networks]
        return sum(math.log(max(value, 1e-12)) for value in found) / len(found)

    def labels(self, count: int) -> list[int | None]:
        """Return labels of training images in a shuffled order, repeated if there are too few."""
        return shuffled(self._labels, count, seed=2)

    def held_out_labels(self, count: int) -> list[int | None]:
        """Return labels of held-out images in the same way, for the reported samples."""
        return shuffled(self._held_out_labels, count, seed=0)

    def _measured(self, pixels: torch.Tensor, features: list[torch.Tensor], held_out: bool = True) -> dict:
        by_network = {
            network.extractor.name: network(of_network, self.config.bootstrap, held_out)
            for network, of_network in zip(self.networks, features)
        }
        return self._pixel_measures(pixels) | {"features": by_network}

    def _pixel_measures(self, pixels: torch.Tensor) -> dict:
        nearest = self._nearest(pixels)
        copies = float((nearest <= self.config.near).double().mean())
        return {"pictures": len(pixels)} | rounded(
            {"copies": copies, "nearest_pixels": float(nearest.median()) / max(self._new_distance, MIN_DISTANCE)}
        )


def shuffled(labels: list[int | None], count: int, seed: int) -> list[int | None]:
    order = torch.randperm(len(labels), generator=seeded(seed)).tolist()
    return [labels[order[index % len(order)]] for index in range(count)]


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in values.items()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
