"""A network that is trained further should have learned the latents and classes of the shards."""

from __future__ import annotations

from pathlib import Path

from ..autoencoder import FrozenAutoencoder
from ..pipelines.loading import index_of, is_own
from .coarse_labels import class_names
from .run import Run


def other_data(run: Run, folder: Path) -> str | None:
    """Return in what the pipeline around the network in ``folder`` differs from the shards: autoencoder or classes; None if in
    nothing, or if the network is in no pipeline of this project.

    Latents of another autoencoder, or labels in another order, look like any others, and only bad samples show the mistake.
    """
    index, vae = index_of(folder.parent), folder.parent / "vae"
    if not is_own(index):
        return None
    if vae.is_dir() and run.manifest.difference_of(FrozenAutoencoder.from_pretrained(vae)) is not None:
        return f"another autoencoder than {run.manifest.metadata['autoencoder']['source']}, which encoded the shards"
    names = index.get("id2label") or {}
    for number, name in enumerate(class_names(run.config, run.manifest.classes)):
        if names and names.get(str(number)) != name:
            return f"other classes: number {number} is {names.get(str(number), 'none')!r}, and {name!r} in the shards"
    return None
