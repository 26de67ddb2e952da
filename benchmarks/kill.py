"""Kill it at random moments, start it again, and compare with a run that nobody disturbed, byte by byte: tools/encode.py and
tools/train.py on the demo pictures.

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
OF_THE_CLOCK = ("images_per_second", "data_wait_share")
ENCODE = ["images.source=data/emoji/heldout-*.tar", "images.resolution=64", "autoencoder=checkpoints/autoencoder-emoji"]
ENCODE += ["shard_size=16", "batch_size=8"]
TRAIN = ["model.block_out_channels=[16,32]", "model.attention_head_dim=8", "model.norm_num_groups=4", "model.noise_modes=4"]
TRAIN += ["autoencoder=checkpoints/autoencoder-emoji", "images_total=12800", "batch_size=16", "objective.draws=2"]
TRAIN += ["sample_every_images=100000", "log_every_images=160", "checkpoint_every_images=160", "keep_checkpoints=3"]


def command(tool: str, output: Path, shards: Path) -> list[str]:
    settings = ENCODE if tool == "encode" else [*TRAIN, f"shards={shards}"]
    return [sys.executable, f"tools/{tool}.py", *settings, f"output={output}"]


def run(arguments: list[str], seconds: float | None = None) -> bool:
    """Whether it came to its end; killed after ``seconds``."""
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
    """Hash every file of a run, except those that contain times and paths."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("tensorboard") and name not in ("config.yaml", "metrics.jsonl"):
            data = path.read_bytes().replace(str(folder).encode(), b"OUTPUT")
            found[name] = hashlib.sha256(data).hexdigest()
    log = folder / "metrics.jsonl"
    if log.is_file():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in lines]
        found["metrics.jsonl, but for the speed"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return found


def torture(tool: str, folder: Path, shards: Path, kills: int, chance: random.Random) -> dict:
    """One undisturbed run, and runs that are killed until there were as many kills as wanted, the last left to its end."""
    started = time.perf_counter()
    run(command(tool, folder / "undisturbed", shards))
    whole = time.perf_counter() - started
    started = time.perf_counter()
    run([*command(tool, folder / "undisturbed", shards), "--dry-run"])
    least = time.perf_counter() - started
    wanted, done, finished, unequal = digests(folder / "undisturbed"), 0, 0, []
    while done < kills:
        output = folder / f"killed-{finished}"
        # So that it is killed while it starts, reads, computes, writes and ends, several times on the way.
        if run(command(tool, output, shards), chance.uniform(0.5 * least, least + 0.4 * (whole - least))):
            unequal += [] if digests(output) == wanted else [output.name]
            finished += 1
            shutil.rmtree(output)
        else:
            done += 1
            print(f"{tool}: {done} kills, {finished} runs at their end, {len(unequal)} of them unequal", flush=True)
    output = folder / f"killed-{finished}"
    run(command(tool, output, shards))
    unequal += [] if digests(output) == wanted else [output.name]
    return {
        "kills": done,
        "runs": finished + 1,
        "files": len(wanted),
        "unequal": unequal,
        "seconds_undisturbed": round(whole, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each tool")
    arguments = parser.parse_args()
    chance, results = random.Random(0), {}
    with tempfile.TemporaryDirectory() as place:
        shards = Path(place) / "encode" / "undisturbed"
        for tool in ("encode", "train"):
            results[tool] = torture(tool, Path(place) / tool, shards, arguments.kills, chance)
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
