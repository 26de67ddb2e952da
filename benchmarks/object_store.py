"""Latent shards in a local S3 store: 50 faults while two processes read and an encoder writes, and the speed of training.

A proxy in front of the server refuses connections, answers with errors, cuts, truncates and changes bodies, and is offline for
30 seconds. Two ranks share a cache with room for a few shards and read all batches of several epochs. In the middle they end,
and new processes resume. Every batch is compared with that from a local folder. Some downloads find a full disk.

Then the speed of two trainings is compared with that from a local folder (store_training.py).

    python tools/encode.py --config configs/encode/emoji.yaml shard_size=250 output=outputs/object-store/local
    python tools/encode.py --config configs/encode/emoji.yaml output=outputs/object-store/default
    python benchmarks/object_store.py

Writes benchmarks/results/object_store.json.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from faulty_store import LOOPBACK, Fault, FaultyProxy
from store_training import training_rounds, trainings
from targets import target

from ldm_smd.config import load_config
from ldm_smd.data import store
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import CacheConfig, EncodeConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream, latent_loader

RESULT = Path(__file__).parent / "results" / "object_store.json"
READ_FAULTS = {"refuse": 7, "500": 6, "503": 6, "cut": 7, "truncate": 6, "wrong": 6}
WRITE_FAULTS = {"refuse": 3, "500": 3, "503": 3}
FULL_DISKS, OFFLINE_TIME = 2, 30.0
EPOCHS, BATCH_SIZE, SEED = 6, 64, 5
CACHED_SHARDS = 4.5
ENCODE = ["images.source=data/emoji/heldout.zip", "images.resolution=64", "autoencoder=checkpoints/autoencoder-emoji"]
ENCODE += ["shard_size=32", "batch_size=16", "num_workers=0"]
TARGET_SPEED = 0.97
FORK = multiprocessing.get_context("fork")


class StoreProcess:
    """A process with an S3 server and the proxy in front of it."""

    def __init__(self) -> None:
        self.pipe, other_end = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(other_end,), daemon=True)
        self.process.start()
        self.url: str = self.pipe.recv()

    def ask(self, *command: Any) -> Any:
        self.pipe.send(command)
        return self.pipe.recv()

    def injected(self) -> Counter[str]:
        return self.ask("injected")


def serve(pipe: Connection) -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
    server.start()
    proxy = FaultyProxy(server.get_host_and_port()[1])
    pipe.send(proxy.url)
    while True:
        command, *arguments = pipe.recv()
        if command == "fault":
            proxy.faults.append(Fault(*arguments))
        elif command == "offline":
            proxy.go_offline(*arguments)
        elif command == "rate":
            proxy.bytes_per_second = arguments[0]
        pipe.send(Counter(proxy.injected))


def digests(shards: str, cache: CacheConfig | None, rank: int, begin: int, end: int, full_disks: int, results: Any) -> None:
    """Read one rank's slices of the batches in [begin, end), and put their hashes into the queue ``results``."""
    real, remaining = store.download, full_disks

    def download(url: str, path: Path, *others: Any) -> None:
        nonlocal remaining
        if remaining and url.endswith(".tar") and random.random() < 0.3:
            remaining -= 1
            path.write_bytes(b"incomplete")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(url, path, *others)

    store.download = download
    manifest = Manifest.load(shards, cache)
    stream = LatentStream(manifest, BATCH_SIZE, end, begin, seed=SEED, rank=rank, world_size=2)
    found = []
    for batch in latent_loader(stream, num_workers=0):
        found.append(hashlib.sha256(batch.moments.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest())
        time.sleep(0.02 if cache else 0.0)  # time of a training step
    results.put((rank, found, full_disks - remaining))


def read_by_two(
    shards: str, cache: CacheConfig | None, total: int, disks: int, stores: StoreProcess | None
) -> tuple[dict, int]:
    """Read all batches with two processes, replaced in the middle; returns hashes by rank, and the number of full disks."""
    found: dict[int, list[str]] = {0: [], 1: []}
    full_disks, middle = 0, total // 2 // BATCH_SIZE * BATCH_SIZE
    faults = [kind for kind, count in READ_FAULTS.items() for _ in range(count)]
    random.Random(SEED).shuffle(faults)
    for part, (begin, end) in enumerate(((0, middle), (middle, total))):
        results = FORK.Queue()
        readers = [
            FORK.Process(target=digests, args=(shards, cache, rank, begin, end, disks // 2 * (rank == part), results))
            for rank in (0, 1)
        ]
        for reader in readers:
            reader.start()
        if stores is not None:
            inject(stores, faults[part::2], offline=part == 1)
        for _ in readers:
            rank, hashes, count = results.get(timeout=600)
            found[rank] += hashes
            full_disks += count
        for reader in readers:
            reader.join()
    return found, full_disks


def inject(stores: StoreProcess, faults: list[str], offline: bool) -> None:
    """Inject faults one after the other, each as soon as the previous one was applied to a request."""
    for index, kind in enumerate(faults):
        before = stores.injected().total()
        stores.ask("fault", kind, ".tar")
        while stores.injected().total() == before:
            time.sleep(0.05)
        if offline and index == len(faults) // 2:
            stores.ask("offline", OFFLINE_TIME)


def encoded_under_faults(stores: StoreProcess, bucket: str, folder: Path) -> bool:
    """Return whether shards written to the store under faults equal those in a local folder byte by byte."""
    encode(load_config(EncodeConfig, None, [*ENCODE, f"output={folder}"]))
    for kind, count in WRITE_FAULTS.items():
        for index in range(count):
            stores.ask("fault", kind, (".tar", ".json", "manifest")[index], "PUT")
    encode(load_config(EncodeConfig, None, [*ENCODE, f"output={bucket}/encoded"]))
    stored = {each.name: store.read_bytes(each.url, "test") for each in store.list_files(f"{bucket}/encoded", "test")}
    return stored == {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="outputs/object-store/local", type=Path, help="with a dozen shards or more")
    parser.add_argument(
        "--large-shards", default="outputs/object-store/default", type=Path, help="folder with shards of 1000 images"
    )
    parser.add_argument("--rounds", type=int, default=9, help="number of rounds with the tiny network")
    parser.add_argument("--demo-rounds", type=int, default=5, help="number of rounds with the demo's network")
    parser.add_argument("--targets", action="store_true", help="only compute the targets of the result file again")
    arguments = parser.parse_args()
    if arguments.targets:
        result = json.loads(RESULT.read_text(encoding="utf-8"))
        result["targets"] = result["targets"][:3] + training_targets(result["training"])
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    stores = StoreProcess()
    os.environ |= {"AWS_ENDPOINT_URL": stores.url, "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    bucket = "s3://object-store-benchmark"
    local = Manifest.load(arguments.shards)
    total, largest = EPOCHS * local.count, max(path.stat().st_size for path in arguments.shards.glob("*.tar"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Uploads run in another process, because they start threads, and the readers are forked from this one.
        uploading = FORK.Process(target=upload_all, args=(bucket, arguments.shards, arguments.large_shards))
        uploading.start()
        uploading.join()
        url = f"{bucket}/{arguments.shards.name}"
        expected, _ = read_by_two(str(arguments.shards), None, total, 0, None)
        cache = CacheConfig(str(folder / "cache"), CACHED_SHARDS * largest / 1e9)
        started = time.perf_counter()
        found, full_disks = read_by_two(url, cache, total, FULL_DISKS, stores)
        seconds = time.perf_counter() - started
        reading = stores.injected()
        batches = sum(map(len, expected.values()))
        same = sum(a == b for rank in (0, 1) for a, b in zip(found[rank], expected[rank]))
        print(f"{same} of {batches} batches are equal, after {dict(reading)} and {full_disks} full disks", flush=True)
        equal = encoded_under_faults(stores, bucket, folder / "encoded")
        writing = stores.injected() - reading
        print(f"encoded the same: {equal}, after {dict(writing)}", flush=True)
        trained = [
            training_rounds(training, lambda rate: stores.ask("rate", rate), f"{bucket}/{training.shards.name}", folder)
            for training in trainings(arguments.shards, arguments.large_shards, arguments.rounds, arguments.demo_rounds)
        ]
    result = {
        "command": " ".join(["python", "benchmarks/object_store.py", *sys.argv[1:]]),
        "samples": local.count,
        "shards": len(local.shards),
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "fsspec", "s3fs", "aiobotocore", "moto")},
        "faults": {"reading": dict(reading), "writing": dict(writing), "full_disk": full_disks, "away_seconds": OFFLINE_TIME},
        "reading": {
            "batches": batches,
            "lost_or_repeated": abs(sum(map(len, found.values())) - batches),
            "changed": batches - same,
            "seconds": round(seconds, 1),
        },
        "training": trained,
    }
    lost_or_changed = batches - same + abs(sum(map(len, found.values())) - batches)
    result["targets"] = [
        target("faults injected", ">= 50", reading.total() + writing.total() + full_disks),
        target("batches lost, repeated or changed", "<= 0", lost_or_changed),
        target("files that differ from a local encoding (0: none)", "<= 0", 0 if equal else 1),
        *training_targets(trained),
    ]
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["targets"], indent=1))


def training_targets(trained: list[dict]) -> list[dict]:
    """Return the targets. They are compared with the lower end of the interval, so a noisy measurement cannot meet them."""
    names = {"store ratio": "images a second over a local folder", "store trains": "share of the processor time that trains"}
    return [
        target(f"from the store, {names[key]}: {each['training']}", f">= {TARGET_SPEED}", each[key]["interval"][0])
        for key in names
        for each in trained
    ]


def upload_all(bucket: str, *folders: Path) -> None:
    store.store_of(bucket, "test")[0].mkdir(bucket.removeprefix("s3://"))
    for folder in folders:
        for path in folder.glob("[!.]*"):
            store.upload(path, f"{bucket}/{folder.name}/{path.name}", "test")


if __name__ == "__main__":
    main()
