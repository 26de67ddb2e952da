"""Latent shards in an S3 store on this machine: 50 faults while two nodes read and an encoder writes, and how fast a training
is from there.

Before the server is a proxy that refuses, answers with errors, cuts, shortens and changes bodies, and is away for 30 seconds.
Two processes with one cache, which has room for a few shards, read all batches of some epochs, each its half; both end in the
middle and go on in new processes. Every batch is compared with that of a local folder. Some downloads meet a full disk.

The training is of the Gaussian model of ``MODEL``, from a local folder and from the store with an empty cache in turn; the link
gives twice the bytes a second that the fastest local round needed. The ratio is taken round by round, after the first batch,
and its median is the result.

    python tools/encode.py --config configs/encode/emoji.yaml shard_size=250 output=outputs/object-store/local
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
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from faulty_store import LOOPBACK, Fault, FaultyProxy
from targets import target

from ldm_smd.config import load_config
from ldm_smd.data import store
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import CacheConfig, EncodeConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream, latent_loader
from ldm_smd.training.metrics_log import DataWaits
from ldm_smd.training.run import Run
from ldm_smd.training.settings import TrainConfig
from ldm_smd.training.step import Denoising

RESULT = Path(__file__).parent / "results" / "object_store.json"
READ_FAULTS = {"refuse": 7, "500": 6, "503": 6, "cut": 7, "truncate": 6, "wrong": 6}
WRITE_FAULTS = {"refuse": 3, "500": 3, "503": 3}
FULL_DISKS, OFFLINE_TIME = 2, 30.0
EPOCHS, BATCH_SIZE, SEED = 6, 64, 5
CACHED_SHARDS = 4.5
ENCODE = ["images.source=data/emoji/heldout-*.tar", "images.resolution=64", "autoencoder=checkpoints/autoencoder-emoji"]
ENCODE += ["shard_size=32", "batch_size=16", "num_workers=0"]
MODEL = ["model.block_out_channels=[32,64]", "model.attention_head_dim=16", "model.z_channels=0", "objective.name=mse"]
MODEL += ["autoencoder=checkpoints/autoencoder-emoji", "batch_size=64", "precision=no"]
TARGET_SPEED, LINK = 0.97, 2.0
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
    real, left = store.download, full_disks

    def download(url: str, path: Path, *others: Any) -> None:
        nonlocal left
        if left and url.endswith(".tar") and random.random() < 0.3:
            left -= 1
            path.write_bytes(b"as much as fits")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(url, path, *others)

    store.download = download
    manifest = Manifest.load(shards, cache)
    stream = LatentStream(manifest, BATCH_SIZE, end, begin, seed=SEED, rank=rank, world_size=2)
    found = []
    for batch in latent_loader(stream, num_workers=0):
        found.append(hashlib.sha256(batch.moments.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest())
        time.sleep(0.02 if cache else 0.0)  # time of a training step
    results.put((rank, found, full_disks - left))


def read_by_two(
    shards: str, cache: CacheConfig | None, total: int, disks: int, stores: StoreProcess | None
) -> tuple[dict, int]:
    """Read all batches with two processes that are replaced in the middle; returns hashes by rank, and full disks met."""
    found: dict[int, list[str]] = {0: [], 1: []}
    met, middle = 0, total // 2 // BATCH_SIZE * BATCH_SIZE
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
            rank, hashes, disk = results.get(timeout=600)
            found[rank] += hashes
            met += disk
        for reader in readers:
            reader.join()
    return found, met


def inject(stores: StoreProcess, faults: list[str], offline: bool) -> None:
    """Inject one fault after the other, each as soon as a request has met the one before."""
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
    stored = {each.name: store.read_bytes(each.url, "test") for each in store.listed(f"{bucket}/encoded", "test")}
    return stored == {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


class Trainee:
    """A training, a step at a time."""

    def __init__(self, shards: Path, folder: Path) -> None:
        config = load_config(TrainConfig, None, [*MODEL, f"shards={shards}", f"output={folder / 'run'}"])
        accelerator = Accelerator(mixed_precision="no")
        self.batch_size, self.images_seen, self.device = config.batch_size, 0, accelerator.device
        self.learner = Denoising(Run.open(config, accelerator))
        self.learner.model.prepare(accelerator)

    def images_per_second(self, manifest: Manifest, seed: int) -> tuple[float, float]:
        """Over one epoch after its first batch, and the share of that time it waited for data."""
        stream, waits = LatentStream(manifest, self.batch_size, manifest.count, seed=seed), DataWaits()
        count, started = 0, 0.0
        for batch in waits.timed(latent_loader(stream, num_workers=0)):
            if not started:
                waits.share()
                started = time.perf_counter()
            else:
                count += self.batch_size
            self.learner.step(batch.to(self.device), self.images_seen, learning_rate=1e-4)
            self.images_seen += self.batch_size
        return (count + self.batch_size) / (time.perf_counter() - started), waits.share()


def training_rates(stores: StoreProcess, shards: Path, url: str, folder: Path, rounds: int) -> tuple[list[dict], float]:
    """Images a second and shares of waiting, by round; and the bytes a second of the link."""
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # the server and the proxy are on another machine in life
    trainee, local = Trainee(shards, folder), Manifest.load(shards)
    bytes_per_image = sum((shards / item["name"]).stat().st_size for item in local.shards) / local.count
    needed = bytes_per_image * max(trainee.images_per_second(local, seed=0)[0] for _ in range(3))
    rows = []
    for seed in range(1, rounds + 1):
        row = dict(zip(("local", "local waits"), trainee.images_per_second(local, seed)))
        needed = max(needed, bytes_per_image * row["local"])
        stores.ask("rate", LINK * needed)
        shutil.rmtree(folder / "training-cache", ignore_errors=True)
        remote = Manifest.load(url, CacheConfig(str(folder / "training-cache")))
        row |= dict(zip(("store", "store waits"), trainee.images_per_second(remote, seed)))
        rows.append(row | {"ratio": row["store"] / row["local"]})
        print(", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    stores.ask("rate", None)
    return rows, LINK * needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="outputs/object-store/local", type=Path, help="a dozen or more")
    parser.add_argument("--rounds", type=int, default=5, help="of the training")
    arguments = parser.parse_args()
    stores = StoreProcess()
    os.environ |= {"AWS_ENDPOINT_URL": stores.url, "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    bucket = "s3://object-store-benchmark"
    local = Manifest.load(arguments.shards)
    total, largest = EPOCHS * local.count, max(path.stat().st_size for path in arguments.shards.glob("*.tar"))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # The libraries' threads start in processes of their own: the readers are forked.
        uploading = FORK.Process(target=upload_all, args=(arguments.shards, bucket))
        uploading.start()
        uploading.join()
        url = f"{bucket}/latents"
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
        rows, link = training_rates(stores, arguments.shards, url, folder, arguments.rounds)
    faults = reading.total() + writing.total() + full_disks
    ratio = statistics.median(row["ratio"] for row in rows)
    result = {
        "command": " ".join(["python", "benchmarks/object_store.py", *sys.argv[1:]]),
        "samples": local.count,
        "shards": len(local.shards),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "fsspec", "s3fs", "aiobotocore", "moto")},
        "faults": {"reading": dict(reading), "writing": dict(writing), "full_disk": full_disks, "away_seconds": OFFLINE_TIME},
        "reading": {
            "batches": batches,
            "lost_or_repeated": abs(sum(map(len, found.values())) - batches),
            "changed": batches - same,
            "seconds": round(seconds, 1),
        },
        "training": {"rounds": rows, "link_bytes_per_second": round(link)},
        "targets": [
            target("faults injected", ">= 50", faults),
            target("batches lost, repeated or changed", "<= 0", batches - same + abs(sum(map(len, found.values())) - batches)),
            target("files that differ from a local encoding (0: none)", "<= 0", 0 if equal else 1),
            target("training from the store, over a local folder", f">= {TARGET_SPEED}", ratio),
        ],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["targets"], indent=1))


def upload_all(shards: Path, bucket: str) -> None:
    store.store_of(bucket, "test")[0].mkdir(bucket.removeprefix("s3://"))
    for path in shards.glob("[!.]*"):
        store.upload(path, f"{bucket}/latents/{path.name}", "test")


if __name__ == "__main__":
    main()
