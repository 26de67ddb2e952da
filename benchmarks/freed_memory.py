"""Compares the tools with and without ldm_smd/memory.py: seconds of whole commands, and peak memory.

Both take turns, so that a slow moment of the machine affects both. The result is the median over rounds of the ratio within a
round. glibc.malloc.check=0 is a setting without effect, but with it the tools leave malloc as it is.

    python benchmarks/freed_memory.py        # ten minutes

Writes benchmarks/results/freed_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from targets import target

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "freed_memory.json"
ENCODE = (
    "tools/encode.py --config configs/encode/emoji-256.yaml images.source=data/emoji-256/heldout.zip output={folder}/latents"
)
COMMANDS = {
    "encode 1,095 images": ENCODE,
    "train on 1,280 images": "tools/train.py --config configs/train/emoji-256-energy-first.yaml shards={shared}/latents"
    " output={folder}/run images_total=1280 warmup_images=128 cooldown_images=128 sample_every_images=100000",
    "sample 81 images": "tools/sample.py model=checkpoints/emoji-256-smd steps=4 per_class=3 output={folder}/samples",
}
DEFAULT_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}


def measure(command: str, environment: dict[str, str], **folders: Path | str) -> tuple[float, float]:
    """Run a command; returns its seconds, and the peak memory of its process in GB."""
    arguments = [sys.executable, *command.format(**folders).split()]
    started = time.perf_counter()
    process = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(arguments)}")
    return seconds, usage.ru_maxrss / 2**20


def compare(command: str, rounds: int, shared: Path) -> dict:
    """Run a command ``rounds`` times with and without; returns seconds, peak memory and the medians of their ratios."""
    rows = []
    for _ in range(rounds):
        row = {}
        for name, environment in (("kept", {}), ("default", DEFAULT_MALLOC)):
            with tempfile.TemporaryDirectory() as folder:
                seconds, gigabytes = measure(command, environment, folder=folder, shared=shared)
            row[name] = {"seconds": round(seconds, 2), "peak_gb": round(gigabytes, 2)}
        rows.append(row)
        print(row, flush=True)
    ratios = {
        f"{quantity}_ratio": round(statistics.median(row["kept"][quantity] / row["default"][quantity] for row in rows), 3)
        for quantity in ("seconds", "peak_gb")
    }
    return {**ratios, "rounds": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as shared:
        measure(ENCODE, {}, folder=shared)  # latents to train on
        results = {name: compare(command, arguments.rounds, Path(shared)) for name, command in COMMANDS.items()}
    result = {
        "command": " ".join(["python", "benchmarks/freed_memory.py", *sys.argv[1:]]),
        "pixels": 256,
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "commands": results,
        "targets": [target(f"{name}: seconds / default", "<= 1", each["seconds_ratio"]) for name, each in results.items()],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
