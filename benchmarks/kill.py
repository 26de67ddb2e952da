"""Kills tools/encode.py and tools/train.py at random moments, restarts them, and compares the results with undisturbed runs.

The results must be equal byte by byte. Both tools run on the demo images.

    python benchmarks/kill.py            # 50 kills of each, about 20 minutes on two cores
    python benchmarks/kill.py --kills 5

Writes benchmarks/results/kill.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "kill.json"
TIMINGS = ("images_per_second", "data_wait_share")
ENCODE = ["images.source=data/emoji/heldout.zip", "images.resolution=64", "autoencoder=checkpoints/autoencoder-emoji"]
ENCODE += ["shard_size=16", "batch_size=8"]
TRAIN = ["model.block_out_channels=[16,32]", "model.attention_head_dim=8", "model.norm_num_groups=4", "model.noise_modes=4"]
TRAIN += ["autoencoder=checkpoints/autoencoder-emoji", "images_total=12800", "batch_size=16", "objective.draws=2"]
TRAIN += ["sample_every_images=100000", "log_every_images=160", "checkpoint_every_images=160", "keep_checkpoints=3"]


def command(tool: str, output: Path, shards: Path) -> list[str]:
    settings = ENCODE if tool == "encode" else [*TRAIN, f"shards={shards}"]
    return [sys.executable, f"tools/{tool}.py", *settings, f"output={output}"]


def run(arguments: list[str], seconds: float | None = None) -> bool:
    """Run a command, and kill it after ``seconds``; returns whether it finished before."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}: {error.decode()[-500:]}")
    return True


def digests(folder: Path) -> dict[str, str]:
    """Hash every file of a run, without those that contain times and paths."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("tensorboard") and name not in ("config.yaml", "metrics.jsonl"):
            data = path.read_bytes().replace(str(folder).encode(), b"OUTPUT")
            found[name] = hashlib.sha256(data).hexdigest()
    log = folder / "metrics.jsonl"
    if log.is_file():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
        found["metrics.jsonl without timings"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return found


def compare(tool: str, folder: Path, shards: Path, kills: int, generator: random.Random) -> dict:
    """Compare an undisturbed run with runs that are killed and restarted, until there were ``kills`` kills."""
    started = time.perf_counter()
    run(command(tool, folder / "undisturbed", shards))
    full = time.perf_counter() - started
    started = time.perf_counter()
    run([*command(tool, folder / "undisturbed", shards), "--dry-run"])
    startup = time.perf_counter() - started
    wanted, done, finished, unequal = digests(folder / "undisturbed"), 0, 0, []
    while done < kills:
        output = folder / f"killed-{finished}"
        # A run is killed several times: while it starts, reads, computes, writes or ends.
        if run(command(tool, output, shards), generator.uniform(0.5 * startup, startup + 0.4 * (full - startup))):
            unequal += [] if digests(output) == wanted else [output.name]
            finished += 1
            shutil.rmtree(output)
        else:
            done += 1
            print(f"{tool}: {done} kills, {finished} runs finished, {len(unequal)} of them unequal", flush=True)
    output = folder / f"killed-{finished}"
    run(command(tool, output, shards))
    unequal += [] if digests(output) == wanted else [output.name]
    return {
        "kills": done,
        "runs": finished + 1,
        "files": len(wanted),
        "unequal": unequal,
        "seconds_undisturbed": round(full, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills per tool")
    arguments = parser.parse_args()
    generator, results = random.Random(0), {}
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "encode" / "undisturbed"
        for tool in ("encode", "train"):
            results[tool] = compare(tool, Path(folder) / tool, shards, arguments.kills, generator)
            print(f"{tool}: {results[tool]}")
    targets = [
        {"name": f"{tool}, unequal runs", "target": "0", "measured": len(entry["unequal"]), "holds": not entry["unequal"]}
        for tool, entry in results.items()
    ]
    command = " ".join(["python", "benchmarks/kill.py", *sys.argv[1:]])
    result = {"command": command, "seed": 0, **results, "targets": targets}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(target["holds"] for target in targets):
        raise SystemExit("unequal runs")


if __name__ == "__main__":
    main()
