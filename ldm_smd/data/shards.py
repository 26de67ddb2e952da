"""Latent shards: the file format between tools/encode.py and training.

A shard is a webdataset tar. The files of a sample are:

* ``KEY.moments.npy``: float16, (2, C, h, w), mean and log-variance; (1, C, h, w) from a deterministic autoencoder;
* ``KEY.mirror.npy``, optional: the same for the mirrored image;
* ``KEY.clip.npy``, optional: float16, (D,), an OpenCLIP embedding of the image, of length 1;
* ``KEY.cls``, if the image has a label: ASCII integer.

Beside each shard is its record, a JSON file of the same name, with statistics and the offsets of the samples. ``manifest.json``
describes all shards and all that the latents depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..autoencoder import FrozenAutoencoder
from ..errors import UserError, shortened
from ..files import read_existing_json, read_json
from . import store
from .cache import FileCache
from .settings import CacheConfig

Result = TypeVar("Result")

MANIFEST = "manifest.json"
FORMAT = "ldm_smd latent shards 1"
DTYPE = np.float16
FIELDS = ("moments.npy", "mirror.npy")
EMBEDDING = "clip.npy"


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.json, and where it is.

    Attributes:
        folder: folder or URL of the shards.
        metadata: settings that the latents depend on.
        shards: one dict for each shard.
        content: bytes of manifest.json.
        cache: local copies, if ``folder`` is a URL.
    """

    folder: Path | str
    metadata: dict
    shards: list[dict]
    content: bytes = b""
    cache: FileCache | None = None

    @classmethod
    def load(cls, folder: str | Path, cache: CacheConfig | None = None) -> Manifest:
        """Read the manifest in a folder or at a URL. Shards at a URL are copied to a cache when they are read.

        Raises UserError if there is no manifest, or another file.
        """
        remote = store.is_remote(folder)
        place: Path | str = str(folder).rstrip("/") if remote else Path(folder)
        if remote:
            store.require_no_credentials(str(place), "shards")
        path = store.join(str(place), MANIFEST) if remote else Path(place) / MANIFEST
        try:
            data = store.read_bytes(str(path), "shards") if remote else Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(
                f"shards: expected a folder with {MANIFEST}, found none in {folder} (tools/encode.py writes it when all shards "
                "are complete; run it again to continue)"
            ) from error
        try:
            content = json.loads(data.decode())
            metadata, shards, found = content["metadata"], content["shards"], content["format"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"shards: expected a manifest of latent shards in {path}, found: {error!r}") from error
        if found != FORMAT:
            raise UserError(f"shards: expected format {FORMAT!r} in {path}, found {found!r}")
        settings = cache or CacheConfig()
        return cls(place, metadata, shards, data, FileCache(settings.folder, settings.bytes) if remote else None)

    @property
    def sha256(self) -> str:
        """Hash of manifest.json, which includes the hashes of all shards."""
        return hashlib.sha256(self.content).hexdigest()

    def place(self, name: str) -> str | Path:
        """Return the path or URL of a file beside the manifest."""
        return Path(self.folder) / name if self.cache is None else store.join(str(self.folder), name)

    def with_shard(self, item: dict, function: Callable[[Path], Result]) -> Result:
        """Return ``function(path)`` for a shard or its verified local copy. An open copy stays readable if it is removed.

        If a copy is removed before it is opened, ``function`` must raise FileNotFoundError, and is called again.
        """
        place = self.place(item["name"])
        if self.cache is not None:
            return self.cache.use(place, function, item["sha256"])
        try:
            return function(Path(place))
        except FileNotFoundError as error:
            expected = f"{item['name']} in {self.folder}, as its manifest says"
            raise UserError(f"shards: expected {expected}, found no such file") from error

    def fetch(self, item: dict) -> None:
        """Copy a shard and its record to the cache, unless another process is copying the shard."""
        assert self.cache is not None
        if self.cache.try_fetch(str(self.place(item["name"])), item["sha256"]):
            self.record(item)

    def record(self, item: dict) -> dict:
        """Return the record of a shard; empty if it is missing or, in a store, if it is damaged or of another shard."""
        place = self.place(str(Path(item["name"]).with_suffix(".json")))
        if self.cache is None:
            return read_json(Path(place))
        try:
            record = self.cache.use(place, read_existing_json, stamp=item["sha256"])
        except UserError:
            return {}
        if record.get("shard") == item and record.get("index_sha256") == index_sha256(record.get("index")):
            return record
        self.cache.discard(str(place), stamp=item["sha256"])
        return {}

    def missing(self) -> str | None:
        """Return the name of the first missing shard; None if there is none or the server cannot list files."""
        existing = set(self.tars())
        listed = existing or self.cache is None
        return next((item["name"] for item in self.shards if listed and item["name"] not in existing), None)

    def tars(self) -> list[str]:
        """List the names of the tars beside the manifest; [] if the server cannot list files."""
        if self.cache is None:
            with suppress(FileNotFoundError, NotADirectoryError):
                return [name for name in os.listdir(self.folder) if name.endswith(".tar")]
            return []
        if str(self.folder).startswith("http"):
            return []
        return [each.name for each in store.list_files(str(self.folder), "shards", "*.tar")]

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
        """Network of the embeddings, its sha256, resize and dimensions; None if there are no embeddings."""
        return self.metadata.get("embedding")

    @property
    def embedding_dimensions(self) -> int | None:
        """Size D of an embedding; None if there are no embeddings."""
        return self.embedding["dimensions"] if self.embedding else None

    def check_autoencoder(self, autoencoder: FrozenAutoencoder) -> None:
        """Raise UserError, naming the difference, unless this autoencoder encoded the shards."""
        recorded, name = self.metadata["autoencoder"], self.difference_of(autoencoder)
        if name is not None:
            raise UserError(
                f"autoencoder: expected the one that encoded the shards in {self.folder} ({recorded['source']}), found "
                f"{autoencoder.name}: {name} differs ({shortened(str(recorded.get(name)), 24)} in the manifest, "
                f"{shortened(str(autoencoder.identity()[name]), 24)} here)"
            )

    def difference_of(self, autoencoder: FrozenAutoencoder) -> str | None:
        """Return in what an autoencoder differs from the one that encoded the shards; None if it gives equal latents."""
        recorded = self.metadata["autoencoder"]
        return next((name for name, value in autoencoder.identity().items() if recorded.get(name) != value), None)


class ShardStatistics:
    """Count, range, mean, standard deviation and number of non-finite values of the moments in a shard, in float64."""

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
    """Per-channel mean and standard deviation of the latents z ~ N(mean, exp(logvar)), accumulated in float64."""

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
        """Return the sums for ``merge``, in JSON types."""
        return vars(self) | {"total": self.total.tolist(), "squares": self.squares.tolist()}

    def merge(self, state: dict) -> None:
        """Add the sums of other statistics, from their ``state``."""
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


def index_sha256(index: dict | None) -> str:
    """Hash the index of a shard. A damaged index is detected by its hash."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
