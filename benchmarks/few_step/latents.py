"""Loads all latents of a data set, with their labels, into the memory of a device."""

from __future__ import annotations

import torch

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream

from .method import Latents


def load_latents(folder: str, autoencoder: FrozenAutoencoder, device: torch.device) -> Latents:
    """Load all moments of latent shards, normalised. Images without a label get the null class."""
    manifest = Manifest.load(folder)
    manifest.check_autoencoder(autoencoder)
    batch = LatentStream(manifest, manifest.count, manifest.count, seed=0, mirror=False).batch_at(0)
    moments = batch.moments.to(device).float()
    autoencoder = autoencoder.to(device)
    parts = [autoencoder.normalise(moments[:, 0])]
    if moments.shape[1] == 2:
        parts.append(moments[:, 1] + 2 * autoencoder.scale.log())
    null = len(manifest.classes)
    labels = batch.labels.to(device)
    return Latents(torch.stack(parts, dim=1), torch.where(labels < 0, null, labels), null)
