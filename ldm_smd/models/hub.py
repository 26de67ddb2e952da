"""Networks from a local folder or the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import UserError, one_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DENOISER_PARTS = ("", "transformer/", "unet/")
"""Sub-folders of a repository to look for a denoiser in, in this order."""
AUTOENCODER_PARTS = ("", "vae/")
FILES = ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
SCHEDULER = "scheduler/scheduler_config.json"
"""Beside a network in a pipeline: the process that it was trained on."""
SHARDS = "diffusion_pytorch_model-*-of-*.safetensors"


def network_folder(source: str | Path, key: str, parts: Sequence[str] = DENOISER_PARTS, revision: str | None = None) -> Path:
    """Return the folder of a network, in ``source`` or in its cached copy from the hub, downloaded if it is missing: its own
    folder, or one of the ``parts`` of a pipeline. ``key`` is the setting that a mistake is blamed on. Only safetensors weights
    are downloaded."""
    folder = Path(source)
    on_hub = not folder.exists() and HUB_ID.fullmatch(str(source)) is not None
    if on_hub:
        wanted = [part + name for part in parts for name in (*FILES, SHARDS)] + [SCHEDULER]
        try:
            folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            said = f"no folder {source}, and on the hub: {one_line(error)}"
            raise UserError(f"{key}: expected a folder of a network or a hub id, found {said}") from error
    network = next((folder / part for part in parts if (folder / part / FILES[0]).is_file()), None)
    if network is None and not on_hub:
        return folder
    if network is None or not any((network / name).is_file() for name in FILES[1:]):
        others = [] if network is None else sorted(path.name for path in network.glob("*.safetensors"))
        found = others[0] if others else "none"
        raise UserError(f"{key}: expected a network with safetensors weights in {source}, found {found}")
    return network
