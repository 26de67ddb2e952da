"""Measures how fast, and in how much memory, tools/encode.py lists its images: synthetic tars, several processes, one index.

    python benchmarks/index.py                       # 10 million images: 20 GB on disk, some minutes
    python benchmarks/index.py --tars 20 40          # a quick run

Two sizes are measured. Time and memory for 100 million images are extrapolated linearly from them.
Writes benchmarks/results/index.json and .md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from targets import target, target_table

from ldm_smd.data.index import ImageIndex
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.data.sources import list_images

RESULT = Path(__file__).parent / "results" / "index.json"
SPAWN = multiprocessing.get_context("spawn")
BLOCK = 512
WANTED_RATE, WANTED_MEGABYTES, WANTED_START = 60_000, 1000, 10.0
EXTRAPOLATED = 100_000_000
READ_AT_RANDOM = 2000
POLL = 0.2


def header(name: bytes, size: int) -> np.ndarray:
    """Build a ustar header without its checksum."""
    block = np.zeros(BLOCK, np.uint8)
    for offset, text in (
        (0, name),
        (100, b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0" + b" " * 8 + b"0"),
        (257, b"ustar\x0000"),
    ):
        block[offset : offset + len(text)] = np.frombuffer(text, np.uint8)
    return block


def write_tars(folder: Path, first: int, stop: int, images: int) -> None:
    """Write tars of ``images`` labelled images, each one block long."""
    digits = len(str(images - 1))
    name = b"%06d" + b"0" * digits
    for number in range(first, stop):
        rows = np.zeros((images, 4, BLOCK), np.uint8)
        rows[:, 0], rows[:, 2] = header(name % number + b".jpg", BLOCK), header(name % number + b".cls", 3)
        indices = np.arange(images)
        for digit in range(digits):
            rows[:, [0, 2], 6 + digits - 1 - digit] = (ord("0") + indices // 10**digit % 10)[:, None]
        for digit in range(3):
            rows[:, 3, 2 - digit] = ord("0") + indices % 1000 // 10**digit % 10
        for row in (0, 2):
            sums = rows[:, row].sum(axis=1, dtype=np.int64)
            for digit in range(6):
                rows[:, row, 148 + 5 - digit] = ord("0") + sums // 8**digit % 8
            rows[:, row, 154], rows[:, row, 155] = 0, ord(" ")
        with open(folder / f"{number:06d}.tar", "wb") as file:
            file.write(rows.tobytes())
            file.write(bytes(2 * BLOCK))


def index_of(source: Path, folder: Path, turn: tuple[int, int] = (0, 1)) -> ImageIndex:
    return list_images(ImagesConfig(source=f"{source}/*.tar"), folder, turn)


def timed_listing(source: Path, folder: Path, turn: tuple[int, int], results: multiprocessing.Queue) -> None:
    started = time.perf_counter()
    index = index_of(source, folder, turn)
    seconds = time.perf_counter() - started
    assert len(index.classes) == 1000 and not len(index.repeated.numbers)
    numbers = np.random.default_rng(turn[0]).integers(len(index), size=READ_AT_RANDOM)
    started = time.perf_counter()
    for number in numbers:
        assert len(index[number].read()) == BLOCK
    read = (time.perf_counter() - started) / len(numbers)
    results.put({"seconds": seconds, "pictures": len(index), "seconds_per_random_picture": read})


def proportional_megabytes(process: int) -> float:
    """Return the proportional set size (PSS) of a process, where shared pages are divided among processes; 0 after its end."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def run(source: Path, folder: Path, processes: int) -> dict:
    """List the source with several processes at once."""
    results = SPAWN.Queue()
    workers = [
        SPAWN.Process(target=timed_listing, args=(source, folder, (turn, processes), results)) for turn in range(processes)
    ]
    for worker in workers:
        worker.start()
    peak = 0.0
    while any(worker.is_alive() for worker in workers):
        peak = max(peak, sum(proportional_megabytes(worker.pid) for worker in workers))
        time.sleep(POLL)
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a listing process failed")
    found = [results.get() for _ in workers]
    return {
        "seconds": max(each["seconds"] for each in found),
        "pictures": found[0]["pictures"],
        "seconds_per_random_picture": max(each["seconds_per_random_picture"] for each in found),
        "megabytes_of_all_processes": peak,
    }


def measure(tars: int, images: int, processes: int, work: Path) -> dict:
    source, folder = work / "source", work / "index"
    source.mkdir(exist_ok=True)
    write_tars(source, len(list(source.iterdir())), tars, images)
    shutil.rmtree(folder, ignore_errors=True)
    listing = run(source, folder, processes)
    start = run(source, folder, processes)
    size = sum(path.stat().st_size for path in folder.iterdir())
    found = {"listing": listing, "start": start, "index_bytes_per_picture": size / listing["pictures"]}
    print(json.dumps(found), flush=True)
    return found


def line_through(small: dict, large: dict, part: str, value: str) -> float:
    """Extrapolate ``value`` to EXTRAPOLATED images, along the straight line through both sizes."""
    counts = [each["listing"]["pictures"] for each in (small, large)]
    values = [each[part][value] for each in (small, large)]
    return values[1] + (values[1] - values[0]) / (counts[1] - counts[0]) * (EXTRAPOLATED - counts[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tars", type=int, nargs=2, default=[200, 1000], help="number of tars of the smaller and the larger source"
    )
    parser.add_argument("--images", type=int, default=10_000, help="images per tar")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", help="folder on the disk to measure; default: that of temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        sizes = [measure(tars, arguments.images, arguments.processes, Path(work)) for tars in arguments.tars]
    large = sizes[1]
    rate = large["listing"]["pictures"] / large["listing"]["seconds"]
    memory = max(large[part]["megabytes_of_all_processes"] for part in ("listing", "start"))
    million = f"{large['listing']['pictures'] / 1e6:g} million images"
    result = {
        "command": " ".join(["python", "benchmarks/index.py", *sys.argv[1:]]),
        "processes": arguments.processes,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "sizes": sizes,
        "extrapolated": {
            "pictures": EXTRAPOLATED,
            "listing_seconds": line_through(*sizes, "listing", "seconds"),
            "listing_megabytes_of_all_processes": line_through(*sizes, "listing", "megabytes_of_all_processes"),
            "start_seconds": line_through(*sizes, "start", "seconds"),
            "index_gigabytes": large["index_bytes_per_picture"] * EXTRAPOLATED / 1e9,
        },
        "targets": [
            target(f"{million}, listed per second", f">= {WANTED_RATE}", round(rate)),
            target(f"{million}, megabytes of all processes", f"<= {WANTED_MEGABYTES}", round(memory)),
            target(f"{million}, seconds to start with an index", f"<= {WANTED_START}", round(large["start"]["seconds"], 2)),
        ],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(result)
    RESULT.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def table(result: dict) -> str:
    lines = [
        f"Listing synthetic tars with {result['processes']} processes on {result['cores']} cores (`{result['command']}`). "
        "The last row is extrapolated linearly from the others.",
        "",
        "| images | listing | memory of all processes | start with the index | memory | index on disk |",
        "|---|---|---|---|---|---|",
    ]
    for size in result["sizes"]:
        listing, start = size["listing"], size["start"]
        gigabytes = size["index_bytes_per_picture"] * listing["pictures"] / 1e9
        lines.append(
            f"| {listing['pictures']:,} | {listing['seconds']:.0f} s | {listing['megabytes_of_all_processes']:.0f} MB | "
            f"{start['seconds']:.1f} s | {start['megabytes_of_all_processes']:.0f} MB | {gigabytes:.2f} GB |"
        )
    far = result["extrapolated"]
    lines.append(
        f"| {far['pictures']:,} | {far['listing_seconds'] / 60:.0f} min | {far['listing_megabytes_of_all_processes']:.0f} MB | "
        f"{far['start_seconds']:.0f} s | | {far['index_gigabytes']:.1f} GB |"
    )
    return "\n".join(lines + target_table(result["targets"])) + "\n"


if __name__ == "__main__":
    main()
