"""Features of sets of images, whose computation is shared by the processes of a launcher.

Each process handles a contiguous slice of the images, so the result does not depend on the number of processes or the batch
size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..files import atomic_file, this_process
from .features import Extractor


@dataclass
class ImageFeatures:
    """Features of one set of images.

    Attributes:
        features: one float32 (N, D) per network, in the order of the images. On the main process only.
        sha256: hash of all images, independent of their order.
        labels: labels of the images that have one, in order.
        classes: names of the classes, if known.
    """

    features: list[torch.Tensor]
    sha256: str
    labels: list[int]
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features[0])

    def save(self, path: Path) -> None:
        tensors = {f"features.{index}": features for index, features in enumerate(self.features)}
        with atomic_file(path, this_process()) as temporary:  # another process may save the same file
            save_file(tensors | {"labels": torch.tensor(self.labels)}, temporary, metadata={"sha256": self.sha256})

    @classmethod
    def load(cls, path: Path, networks: int) -> ImageFeatures:
        """Load from the cache. As after ``extract_features``, only the main process has the features."""
        wanted = range(networks if PartialState().is_main_process else 0)
        with safe_open(path, framework="pt") as file:
            features = [file.get_tensor(f"features.{index}") for index in wanted]
            return cls(features, file.metadata()["sha256"], file.get_tensor("labels").tolist())


def rank_slice(count: int, state: PartialState) -> range:
    """Return the slice of ``range(count)`` for this process, in order of rank."""
    rank, world = state.process_index, state.num_processes
    return range(count * rank // world, count * (rank + 1) // world)


def extract_features(
    name: str, batches: Iterable[torch.Tensor], labels: list[int], extractors: list[Extractor]
) -> ImageFeatures:
    """Compute the features of this process's images, uint8 (b, 3, H, W), and gather those of all processes."""
    parts: list[list[torch.Tensor]] = [[] for _ in extractors]
    hashes = 0
    for pixels in batches:
        hashes += sum(int.from_bytes(hashlib.sha256(image.contiguous().numpy()).digest(), "big") for image in pixels)
        for part, extractor in zip(parts, extractors):
            part.append(extractor(pixels).float())
    own = [torch.cat(part) for part in parts if part]
    gathered = gather_object([(len(own[0]) if own else 0, hashes, labels)])
    if not sum(count for count, _, _ in gathered):
        raise UserError(f"{name}: expected readable images, found none")
    total = sum(value for _, value, _ in gathered) % 2**256
    all_labels = [label for *_, of_process in gathered for label in of_process]
    nonempty = [features for features in gathered_by_first(own) if features]
    return ImageFeatures([torch.cat(of_network) for of_network in zip(*nonempty)], f"{total:064x}", all_labels)


def gathered_by_first(own: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Gather the features of all processes on the first one, whose memory alone they take; the others return []."""
    state = PartialState()
    if state.num_processes == 1:
        return [own]
    found: list | None = [None] * state.num_processes if state.is_main_process else None
    torch.distributed.gather_object(own, found)
    return found or []
