"""All that the picture benchmarks measure of samples, in the features of two networks that were trained otherwise, and whether
training pictures come out again. What is claimed of pictures is to hold in both networks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from nearest import NearestPicture

from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.device import pick_device
from ldm_smd.evaluation.distances import BLOCK, FeatureSet, distances, frechet_distance
from ldm_smd.evaluation.features import Extractor, load_extractor
from ldm_smd.schema import check

DIGITS = 5
LEAST = 1e-9


@dataclass
class PictureConfig:
    """Reference images and measures."""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    """The pictures the models were trained on."""
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Real pictures no model has seen, and no checkpoint was chosen by."""
    features: list[str] = field(default_factory=lambda: ["checkpoints/classifier", "checkpoints/features-selfsupervised"])
    """As in tools/evaluate.py."""
    reference: int = 10_000
    """Training pictures compared with, at most; the nearest picture is looked for among all of them."""
    resampled: int = 2000
    """Training pictures drawn anew, as many as the samples will be."""
    bootstrap: int = 10
    near: float = 0.1
    """A sample is a copy where a training picture is within this root mean square over colours and pixels in [0, 1]."""

    def __post_init__(self) -> None:
        check(len(set(self.features)) == len(self.features) > 0, "features", "different networks", self.features)
        for key in ("reference", "resampled", "bootstrap"):
            check(getattr(self, key) >= 2, key, "at least 2", getattr(self, key))


class NetworkMeasure:
    """The measures in the features of one network.

    Args:
        training: uint8 (N, 3, H, W), all of them.
        chosen: rows of ``training`` that distances are taken to.
    """

    def __init__(self, extractor: Extractor, training: torch.Tensor, held_out: torch.Tensor, chosen: torch.Tensor) -> None:
        self.extractor = extractor
        self.training = FeatureSet(extractor(training[chosen], description=extractor.name))
        self.held_out = FeatureSet(extractor(held_out))
        self.new_distance = self._to_nearest(self.held_out.features)

    def __call__(self, features: torch.Tensor, rounds: int, held_out: bool = True) -> dict[str, float]:
        """Statistics of features (N, D)."""
        found = distances(features, self.training, self.extractor.unit_length, rounds)
        if held_out:
            found["frechet_held_out"] = frechet_distance(features, self.held_out)
        return rounded(found | {"nearest": self._to_nearest(features) / max(self.new_distance, LEAST)})

    def _to_nearest(self, features: torch.Tensor) -> float:
        """Median distance to the nearest training picture."""
        nearest = [torch.cdist(rows, self.training.features).min(dim=1).values for rows in features.split(BLOCK)]
        return float(torch.cat(nearest).median())


class PictureMeasure:
    """Measures sets of pictures against training and held-out ones; what these need is computed once.

    Choosing a checkpoint, a setting or a scheduler, of many, by the numbers that are then reported makes these too good, so the
    choice is not to be made by the held-out pictures, nor by the samples that are reported. Training pictures kept back for it
    would be missing in the training, and few. So choose by ``choice``, of samples of other seeds than those reported, with the
    labels of training pictures (``labels``). It knows of the training pictures alone, and what would win by giving them back
    is refused: the share of its copies must not be significantly above the share of training pictures that have another one
    as near. Then report ``measure`` of new seeds, whose ``frechet_held_out`` no choice has seen. What is left: a choice can
    favour what is near the training pictures in ways that are no copies, and where many training pictures are alike the refusal
    is lenient (of the emoji half have another one as near, of the held-out ones, kept back by whole groups, an eighth); so
    report ``frechet_held_out`` and ``copies`` beside ``frechet``.

    Attributes:
        floor: the measures of the held-out pictures: what samples as good as unseen real pictures have, but for the number
            of pictures (a Frechet distance is larger where they are fewer).
        training: the measures of training pictures drawn anew: what a model has that gives them back. Its
            ``frechet_held_out`` is the smallest that a model of these training pictures can be asked for.
    """

    def __init__(self, config: PictureConfig, device: str = "auto") -> None:
        self.config, self.device = config, pick_device(device)
        training, labels, _ = load_pixels(config.images)
        held_out, held_out_labels, _ = load_pixels(config.held_out)
        self._labels, self._held_out_labels = labels, held_out_labels
        chosen = torch.randperm(len(training), generator=seeded(0))[: config.reference]
        self.networks = [NetworkMeasure(load_extractor(name, device), training, held_out, chosen) for name in config.features]
        self._nearest = NearestPicture(training, self.device)
        self._new_distance = float(self._nearest(held_out).median())
        self._chosen, self._training = chosen, training
        self._held_out_pictures = held_out

    @cached_property
    def floor(self) -> dict:
        return self._measured(self._held_out_pictures, [network.held_out.features for network in self.networks], held_out=False)

    @cached_property
    def training(self) -> dict:
        drawn = torch.randint(len(self._chosen), (self.config.resampled,), generator=seeded(1))
        again = [network.training.features[drawn] for network in self.networks]
        return self._measured(self._training[self._chosen[drawn]], again)

    @cached_property
    def _copies_among_training(self) -> float:
        among = self._nearest(self._training[self._chosen[: self.config.resampled]], itself=True)
        return float((among <= self.config.near).double().mean())

    def measure(self, pixels: torch.Tensor) -> dict:
        """Of pictures uint8 (N, 3, H, W): ``pictures``, how many; ``copies``, the share of them within ``near`` of a training
        picture; ``nearest_pixels``, the median distance to the nearest training picture over that of the held-out pictures;
        and for each network, by its name, under ``features``:

        ``frechet``, ``kid``, with bootstrap deviations ``_sd``, ``precision``, ``recall``, ``density``, ``coverage``: to the
        training pictures; ``frechet_held_out``; ``nearest``, as ``nearest_pixels`` but in the features: near 0 where training
        pictures come out again, 1 where what comes out is as new as pictures never trained on.
        """
        return self._measured(pixels, [network.extractor(pixels) for network in self.networks])

    def choice(self, pixels: torch.Tensor) -> float:
        """The number to choose by, smaller is better: the mean over the networks of the logarithm of the Frechet distance to
        the training pictures, so that no network's scale counts more; infinite where training pictures come out again."""
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
        """Return labels of held-out images in the same way, for the samples that are reported."""
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
            {"copies": copies, "nearest_pixels": float(nearest.median()) / max(self._new_distance, LEAST)}
        )


def shuffled(labels: list[int | None], count: int, seed: int) -> list[int | None]:
    order = torch.randperm(len(labels), generator=seeded(seed)).tolist()
    return [labels[order[index % len(order)]] for index in range(count)]


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in values.items()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
