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
    recorded = run.manifest.metadata["autoencoder"]
    if vae.is_dir() and FrozenAutoencoder.from_pretrained(vae).identity()["encoder_sha256"] != recorded["encoder_sha256"]:
        return f"another autoencoder than {recorded['source']}, which encoded the shards"
    wanted = class_names(run.config, run.manifest.classes)
    found = [name for _, name in sorted((int(number), name) for number, name in (index.get("id2label") or {}).items())]
    if found and found[: len(wanted)] != wanted:
        number = next((row for row, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
        here, there = (names[number] if number < len(names) else "none" for names in (found, wanted))
        return f"other classes: number {number} is {here!r}, and {there!r} in the shards"
    return None
