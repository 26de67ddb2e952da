"""Latent shards: the contract between tools/encode.py and training.

A shard is a webdataset tar of samples ``KEY.moments.npy`` (float16, (2, C, h, w): mean and log-variance; (1, C, h, w) from a
deterministic autoencoder), optionally ``KEY.mirror.npy`` (the encoding of the mirrored image) and ``KEY.clip.npy`` (float16,
(D,): an OpenCLIP embedding of the image, of length 1), and ``KEY.cls`` (ASCII integer) where labelled. Beside each shard is its
record, a JSON file of the same name: what is in it, and where. ``manifest.json`` says what is in each shard, and all that the
latents depend on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..autoencoder import FrozenAutoencoder
from ..errors import UserError, shortened
from ..files import sha256

MANIFEST = "manifest.json"
FORMAT = "ldm_smd latent shards 1"
DTYPE = np.float16
FIELDS = ("moments.npy", "mirror.npy")
EMBEDDING = "clip.npy"


@dataclass(frozen=True)
class Manifest:
    """manifest.json, checked. ``metadata`` is what the latents depend on; ``shards`` one dict per shard."""

    folder: Path
    metadata: dict
    shards: list[dict]

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise UserError(
                f"shards: expected a folder with {MANIFEST}, found none in {folder} (tools/encode.py writes it when all shards "
                "are there; run it again to go on)"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            metadata, shards, found = content["metadata"], content["shards"], content["format"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"shards: expected a manifest of latent shards in {path}, found: {error!r}") from error
        if found != FORMAT:
            raise UserError(f"shards: expected format {FORMAT!r} in {path}, found {found!r}")
        return cls(Path(folder), metadata, shards)

    @property
    def sha256(self) -> str:
        """Hash of manifest.json, and so of the latents and all that they depend on."""
        return sha256(self.folder / MANIFEST)

    @property
    def count(self) -> int:
        return sum(shard["count"] for shard in self.shards)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)"""
        return tuple(self.metadata["moments_shape"][1:])

    @property
    def classes(self) -> list[str]:
        return self.metadata["classes"]

    @property
    def embedding(self) -> dict | None:
        """Description of the images' embeddings: network, its sha256, resize, dimensions; None where there are none."""
        return self.metadata.get("embedding")

    @property
    def embedding_dimensions(self) -> int | None:
        """D; None where there are no embeddings."""
        return self.embedding["dimensions"] if self.embedding else None

    def check_autoencoder(self, autoencoder: FrozenAutoencoder) -> None:
        """Raise UserError, naming the field, unless the shards were made by this very autoencoder."""
        recorded = self.metadata["autoencoder"]
        for name, value in autoencoder.identity().items():
            if recorded.get(name) != value:
                raise UserError(
                    f"autoencoder: expected the one that made the shards in {self.folder} ({recorded['source']}), found "
                    f"{autoencoder.name}: {name} differs ({shortened(str(recorded.get(name)), 24)} in the manifest, "
                    f"{shortened(str(value), 24)} here)"
                )


class ShardStatistics:
    """Count, range, mean, deviation and number of non-finite values of one shard's moments, in float64."""

    def __init__(self) -> None:
        self.count = self.values = self.nonfinite = 0
        self.total = self.squares = 0.0
        self.low, self.high = np.inf, -np.inf

    def add(self, moments: np.ndarray) -> None:
        finite = moments[np.isfinite(moments)].astype(np.float64)
        self.count += len(moments)
        self.nonfinite += moments.size - finite.size
        self.values += finite.size
        self.total += finite.sum()
        self.squares += np.square(finite).sum()
        self.low = min(self.low, finite.min(initial=np.inf))
        self.high = max(self.high, finite.max(initial=-np.inf))

    def record(self) -> dict:
        record: dict[str, float] = {"count": self.count, "nonfinite": self.nonfinite}
        if self.values:
            mean = self.total / self.values
            std = max(self.squares / self.values - mean**2, 0.0) ** 0.5
            record |= {"min": float(self.low), "max": float(self.high), "mean": float(mean), "std": float(std)}
        return record


class ChannelStatistics:
    """Per-channel mean and deviation of the latents (of z ~ N(mean, exp(logvar))), accumulated in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.shape: list[int] = []
        self.values = 0
        self.total = self.squares = np.zeros(())

    def add(self, moments: np.ndarray) -> None:
        mean = moments[:, 0].astype(np.float64)
        variance = np.exp(moments[:, 1].astype(np.float64)) if moments.shape[1] == 2 else 0.0
        total, squares = mean.sum(axis=(0, 2, 3)), (np.square(mean) + variance).sum(axis=(0, 2, 3))
        values = mean.size // mean.shape[1]
        self.merge(dict(count=len(moments), shape=list(moments.shape[1:]), values=values, total=total, squares=squares))

    def state(self) -> dict:
        """Return what ``merge`` takes, for JSON."""
        return vars(self) | {"total": self.total.tolist(), "squares": self.squares.tolist()}

    def merge(self, state: dict) -> None:
        """Add the state of another."""
        self.count += state["count"]
        self.shape = state["shape"] or self.shape
        self.values += state["values"]
        self.total = self.total + np.array(state["total"])
        self.squares = self.squares + np.array(state["squares"])

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.values

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.squares / self.values - np.square(self.mean), 0.0))


def read_json(path: Path) -> dict:
    """Read a JSON mapping; empty where there is no readable one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
