"""Latent shards: the contract between tools/encode.py and training.

A shard is a webdataset tar of samples ``KEY.moments.npy`` (float16, (2, C, h, w): mean and log-variance; (1, C, h, w) from
a deterministic autoencoder), ``KEY.mirror.npy`` (the encoding of the mirrored picture) where asked for, and ``KEY.cls``
(ASCII integer) where labelled. Beside the shards lies ``manifest.json``: what is in each shard, and all that the latents
depend on. Shard k holds a fixed slice of the sorted entries and no times are written, so the same input gives the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from ..autoencoder import FrozenAutoencoder
from ..config import EncodeConfig
from ..device import pick_device
from ..errors import UserError
from ..files import atomic_file, atomic_folder, require_unused
from ..progress import progress
from .images import Entry, Picture, list_entries, read_pictures

MANIFEST = "manifest.json"
FORMAT = "ldm_smd latent shards 1"
DTYPE = np.float16


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
            raise UserError(f"shards: expected a folder with {MANIFEST} (tools/encode.py writes it), found none in {folder}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            metadata, shards, found = content["metadata"], content["shards"], content["format"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"shards: expected a manifest of latent shards in {path}, found: {error!r}") from error
        if found != FORMAT:
            raise UserError(f"shards: expected format {FORMAT!r} in {path}, found {found!r}")
        return cls(Path(folder), metadata, shards)

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


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def encode(config: EncodeConfig) -> Manifest:
    """Encode a picture source into latent shards under ``config.output``; the folder appears when all is done."""
    output = Path(config.output)
    require_unused(output)
    entries, classes = list_entries(config.images)
    autoencoder = FrozenAutoencoder.from_pretrained(config.autoencoder).to(pick_device(config.device))
    slices = [entries[start : start + config.shard_size] for start in range(0, len(entries), config.shard_size)]
    width = max(5, len(str(len(slices) - 1)))

    shards, skipped = [], []
    statistics = ChannelStatistics()
    bar = progress(len(entries), 0, "encode")
    with atomic_folder(output) as folder:
        for index, part in enumerate(slices):
            path = folder / f"latents-{index:0{width}d}.tar"
            shard, unreadable = write_shard(path, part, autoencoder, config, statistics, bar)
            shards.append(shard)
            skipped += [{"name": p.name, "reason": p.error} for p in unreadable]
        if statistics.count == 0:
            raise UserError(
                f"images.source: expected readable pictures, found none of {len(entries)} in {config.images.source} "
                f"(first: {skipped[0]['reason']})"
            )
        metadata = {
            "autoencoder": {"source": autoencoder.name, **autoencoder.identity()},
            "resolution": config.images.resolution,
            "crop": config.images.crop,
            "background": config.images.background,
            "mirror": config.mirror,
            "dtype": np.dtype(DTYPE).name,
            "moments_shape": statistics.shape,
            "channel_mean": statistics.mean.tolist(),
            "channel_std": statistics.std.tolist(),
            "classes": classes,
            "versions": {name: version(name) for name in ("torch", "diffusers", "pillow", "webdataset")},
        }
        content = {"format": FORMAT, "metadata": metadata, "shards": shards, "skipped": skipped}
        (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    bar.close()
    for item in skipped[:20]:
        print(f"skipped {item['name']}: {item['reason']}", file=sys.stderr)
    print(f"{statistics.count} pictures in {len(shards)} shards, {len(skipped)} skipped; wrote {output}")
    return Manifest.load(output)


def write_shard(
    path: Path,
    entries: list[Entry],
    autoencoder: FrozenAutoencoder,
    config: EncodeConfig,
    statistics: ChannelStatistics,
    bar,
) -> tuple[dict, list[Picture]]:
    """Encode ``entries`` into one tar; returns its record for the manifest and the pictures that were skipped."""
    skipped: list[Picture] = []
    shard = ShardStatistics()
    with (
        atomic_file(path) as temporary,
        open(temporary, "wb") as stream,
        wds.TarWriter(stream, mtime=0, user="", group="") as tar,
    ):
        for pictures, unreadable in read_pictures(entries, config.images, config.batch_size, config.num_workers):
            skipped += unreadable
            bar.update(len(pictures) + len(unreadable))
            if not pictures:
                continue
            pixels = torch.stack([picture.pixels for picture in pictures])
            moments = _encode(autoencoder, pixels)
            mirrors = _encode(autoencoder, pixels.flip(3)) if config.mirror else None
            statistics.add(moments)
            shard.add(moments)
            for row, picture in enumerate(pictures):
                sample: dict = {"__key__": picture.key, "moments.npy": moments[row]}
                if mirrors is not None:
                    sample["mirror.npy"] = mirrors[row]
                if picture.label is not None:
                    sample["cls"] = str(picture.label)
                tar.write(sample)
    return {"name": path.name, **shard.record(), "sha256": sha256(path)}, skipped


def _encode(autoencoder: FrozenAutoencoder, pixels: torch.Tensor) -> np.ndarray:
    return autoencoder.encode_moments(pixels).cpu().numpy().astype(DTYPE)


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
        record = {"count": self.count, "nonfinite": self.nonfinite}
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
        self._total = self._squares = 0.0

    def add(self, moments: np.ndarray) -> None:
        self.count += len(moments)
        self.shape = list(moments.shape[1:])
        mean = moments[:, 0].astype(np.float64)
        variance = np.exp(moments[:, 1].astype(np.float64)) if moments.shape[1] == 2 else 0.0
        self._values += mean.size // mean.shape[1]
        self._total = self._total + mean.sum(axis=(0, 2, 3))
        self._squares = self._squares + (np.square(mean) + variance).sum(axis=(0, 2, 3))

    @property
    def mean(self) -> np.ndarray:
        return self._total / self._values

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self._squares / self._values - np.square(self.mean), 0.0))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
