"""tools/verify.py: check latent shards against their manifest, and decode some of them for inspection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..autoencoder import FrozenAutoencoder
from ..device import pick_device
from ..errors import UserError
from ..files import atomic_file, claimed, sha256
from ..progress import progress
from .keys import repeated_hashes
from .pieces import key_hash
from .settings import VerifyConfig
from .shards import Manifest, ShardStatistics
from .stream import Shard, open_shard
from .tar_index import index_tar

CHUNK = 256
"""Samples in memory at the same time."""


def verify(config: VerifyConfig) -> None:
    """Read every shard and print a line for each difference from the manifest. Raises UserError if there are any."""
    with nullcontext() if config.sheet is None else claimed(Path(config.sheet), "sheet"):
        manifest = Manifest.load(config.shards, config.shards_cache)
        findings: list[str] = []
        hashes: list[np.ndarray] = []
        with progress(manifest.count, 0, "verify") as bar:
            for item in manifest.shards:
                try:
                    shard = open_shard(manifest, item, manifest.metadata["mirror"])
                except (UserError, OSError) as error:
                    findings.append(str(error))
                else:
                    hashes.append(np.array([key_hash(key) for key in shard.keys], np.uint64))
                    found = manifest.with_shard(item, partial(differences, manifest, item, shard))
                    findings += [f"{item['name']}: {finding}" for finding in found]
                bar.update(item["count"])
        findings += repeated_keys(manifest, hashes)
        unlisted = set(manifest.tars()) - {item["name"] for item in manifest.shards}
        findings += [f"{name}: not in the manifest" for name in sorted(unlisted)]
        for finding in findings:
            print(finding)
        if findings:
            raise UserError(f"shards: expected {manifest.folder} to match its manifest, found {len(findings)} differences")
        if config.sheet is not None:
            write_sheet(Path(config.sheet), config, manifest)
        print(f"{manifest.count} samples in {len(manifest.shards)} shards match their manifest")


def repeated_keys(manifest: Manifest, hashes: list[np.ndarray]) -> list[str]:
    """List the keys that occur more than once, found by their hashes, so that not all keys are in memory."""
    numbers, _ = repeated_hashes(hashes)
    repeated = np.unique(np.concatenate(hashes)[numbers]) if len(numbers) else numbers
    if not len(repeated):
        return []
    found: Counter[str] = Counter()
    for item in manifest.shards:
        with suppress(UserError, OSError):  # already a finding
            keys = open_shard(manifest, item, mirror=False).keys
            found.update(key for key in keys if key_hash(key) in repeated)
    return [f"{key}: occurs {count} times in the shards" for key, count in found.items() if count > 1]


def differences(manifest: Manifest, item: dict, shard: Shard, path: Path) -> list[str]:
    """Return the differences that ``check_shard`` yields as a list."""
    return list(check_shard(manifest, item, shard, path))


def check_shard(manifest: Manifest, item: dict, shard: Shard, path: Path) -> Iterator[str]:
    """Yield how the tar at ``path`` differs from the shard's entry in the manifest, and from the index in its record."""
    if sha256(path) != item["sha256"]:
        yield "sha256 differs"
    dimensions = manifest.embedding_dimensions
    index = index_tar(path, shard.shape, shard.dtype, dimensions)
    found = (shard.keys, shard.labels.tolist(), shard.offsets.tolist(), shard.embedding_offsets.tolist())
    if found != (index["keys"], index["labels"], index["offsets"], index.get("embeddings", [])):
        yield "index in its record differs"
    if dimensions and not np.isfinite(shard.embeddings(np.arange(len(shard)))).all():
        yield "embeddings are not all finite"
    statistics = ShardStatistics()
    for start in range(0, len(shard), CHUNK):
        statistics.add(shard.moments(np.arange(start, min(start + CHUNK, len(shard)))))
    for name, value in statistics.record().items():
        # Sums over other batch sizes differ in the last digits.
        if not np.isclose(value, item.get(name, np.nan), rtol=1e-6, atol=1e-9):
            yield f"{name} is {value}, but {item.get(name)} in the manifest"
    if statistics.nonfinite:
        yield f"{statistics.nonfinite} values are not finite"
    classes = len(manifest.classes)
    wrong = ~np.isin(shard.labels, np.arange(-1, classes))
    if wrong.any():
        yield f"{wrong.sum()} labels are outside the {classes} classes, the first for {shard.keys[int(wrong.argmax())]}"


def write_sheet(sheet: Path, config: VerifyConfig, manifest: Manifest) -> None:
    """Write a grid of decoded latents, evenly spaced over the shards."""
    autoencoder = FrozenAutoencoder.from_pretrained(config.autoencoder or manifest.metadata["autoencoder"]["source"])
    manifest.check_autoencoder(autoencoder)
    autoencoder = autoencoder.to(pick_device(config.device))
    chosen = np.linspace(0, manifest.count - 1, min(config.pictures, manifest.count)).round().astype(int)
    images: list[torch.Tensor] = []
    start = 0
    for item in manifest.shards:
        here = chosen[(chosen >= start) & (chosen < start + item["count"])] - start
        start += item["count"]
        if len(here):
            latents = torch.from_numpy(open_shard(manifest, item, mirror=False).moments(here))[:, 0].float()
            images += autoencoder.decode(autoencoder.normalise(latents.to(autoencoder.device))).cpu()
    grid = make_grid(torch.stack(images) / 2 + 0.5, nrow=int(np.ceil(len(images) ** 0.5)), padding=2, pad_value=1.0)
    with atomic_file(sheet) as temporary:
        to_pil_image(grid).save(temporary, format="PNG")
