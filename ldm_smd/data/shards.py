"""Latent shards: the contract between tools/encode.py and training.

A shard is a webdataset tar of samples ``KEY.moments.npy`` (float16, (2, C, h, w): mean and log-variance; (1, C, h, w) from a
deterministic autoencoder), where asked for ``KEY.mirror.npy`` (the encoding of the mirrored picture) and ``KEY.clip.npy``
(float16, (D,): an OpenCLIP embedding of the picture, of length 1), and ``KEY.cls`` (ASCII integer) where labelled. Beside a
shard lies its record, a JSON file of the same name: what is in it, and where. Beside them all lies ``manifest.json``: what is
in each shard, and all that the latents depend on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..autoencoder import FrozenAutoencoder
from ..errors import UserError
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
        """What the images' embeddings are: network, its sha256, resize, dimensions; None where there are none."""
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
                    f"{autoencoder.name}: {name} differs ({_short(recorded.get(name))} in the manifest, {_short(value)} here)"
                )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:20] + "..."


class ShardStatistics:
    """Count, range, mean, deviation and number of non-finite values of what goes into one shard, in float64."""

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
        self._values = 0
        self._total: np.ndarray = np.zeros(())
        self._squares: np.ndarray = np.zeros(())

    def add(self, moments: np.ndarray) -> None:
        self.count += len(moments)
        self.shape = list(moments.shape[1:])
        mean = moments[:, 0].astype(np.float64)
        variance = np.exp(moments[:, 1].astype(np.float64)) if moments.shape[1] == 2 else 0.0
        self._values += mean.size // mean.shape[1]
        self._total = self._total + mean.sum(axis=(0, 2, 3))
        self._squares = self._squares + (np.square(mean) + variance).sum(axis=(0, 2, 3))

    def state(self) -> dict:
        """For JSON; what ``merge`` takes."""
        return {
            "count": self.count,
            "shape": self.shape,
            "values": self._values,
            "total": self._total.tolist(),
            "squares": self._squares.tolist(),
        }

    def merge(self, state: dict) -> None:
        """Add what another has seen."""
        self.count += state["count"]
        self.shape = state["shape"] or self.shape
        self._values += state["values"]
        self._total = self._total + np.array(state["total"])
        self._squares = self._squares + np.array(state["squares"])

    @property
    def mean(self) -> np.ndarray:
        return self._total / self._values

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self._squares / self._values - np.square(self.mean), 0.0))


def read_json(path: Path) -> dict:
    """Empty where there is no readable one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
