"""Compares the speed of tools/encode.py (images on disk to shards on disk) with that of the autoencoder alone.

The autoencoder alone gets the same batches, decoded beforehand. The two take turns, so that a slow moment of the machine
affects both. The result is the median over rounds of the ratio within a round.

    python benchmarks/encode.py              # the demo images, some minutes
    python benchmarks/encode.py --source 'my/tars/*.tar' --resolution 256 --autoencoder my/vae

Writes benchmarks/results/encode.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from targets import target

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.data.encode import encode
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import EncodeConfig, ImagesConfig
from ldm_smd.device import pick_device

RESULT = Path(__file__).parent / "results" / "encode.json"
SPEED, WANTED = "speed of tools/encode.py / autoencoder alone", 0.95


def bare_seconds(autoencoder: FrozenAutoencoder, pixels: torch.Tensor, batch_size: int) -> float:
    """Return the time to encode every image and its mirror image, as tools/encode.py does."""
    started = time.perf_counter()
    for batch in pixels.split(batch_size):
        for view in (batch, batch.flip(3)):
            autoencoder.encode_moments(view).cpu()
    return time.perf_counter() - started


def tool_seconds(config: EncodeConfig) -> float:
    with tempfile.TemporaryDirectory() as folder:
        config.output = str(Path(folder) / "latents")
        started = time.perf_counter()
        encode(config)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="data/emoji/train.zip")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--autoencoder", default="checkpoints/autoencoder-emoji")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = EncodeConfig(
        images=ImagesConfig(source=arguments.source, resolution=arguments.resolution),
        autoencoder=arguments.autoencoder,
        mirror=True,
    )
    autoencoder = FrozenAutoencoder.from_pretrained(arguments.autoencoder).to(pick_device("auto"))
    pixels, _, _ = load_pixels(config.images)
    rows = []
    for _ in range(arguments.rounds):
        bare, tool = bare_seconds(autoencoder, pixels, config.batch_size), tool_seconds(config)
        rows.append({"bare": len(pixels) / bare, "tool": len(pixels) / tool})
        print(rows[-1], flush=True)
    ratio = statistics.median(row["tool"] / row["bare"] for row in rows)
    result = {
        "command": " ".join(["python", "benchmarks/encode.py", *sys.argv[1:]]),
        "pictures": len(pixels),
        "resolution": arguments.resolution,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": version("torch"),
        "pictures_per_second": rows,
        "targets": [target(SPEED, f">= {WANTED}", ratio)],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{SPEED}: {ratio:.3f} (>= {WANTED})")


if __name__ == "__main__":
    main()
