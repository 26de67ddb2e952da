"""Measures the speed of reading latents with LatentStream, which shuffles and resumes exactly, and of training from it.

It is compared with webdataset on the same tars, a DataLoader over one memory-mapped array, and mosaicml streaming on its own
shards. All yield shuffled batches of the same samples, epoch after epoch. Training is compared with training on one batch in
memory. They take turns, so that a slow moment of the machine affects all. The result is the median over rounds of the ratio
within a round. The first batches, while workers start and buffers fill, are not timed.

    pip install --no-deps -r benchmarks/requirements.txt
    python tools/encode.py --config configs/encode/cifar10.yaml mirror=false output=outputs/cifar10/plain-latents
    python benchmarks/stream.py --shards outputs/cifar10/plain-latents

Writes benchmarks/results/stream.json and .md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

import numpy as np
import streaming
import torch
import webdataset as wds
from accelerate import Accelerator
from targets import target, target_table
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm_smd.config import load_config
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentBatch, LatentStream, latent_loader, open_shard
from ldm_smd.training.run import Run
from ldm_smd.training.settings import TrainConfig
from ldm_smd.training.step import Denoising

RESULT = Path(__file__).parent / "results" / "stream.json"
WORKERS = (0, 1, 2, 4)
SHUFFLE_BUFFER = 2000
WARM_UP_BATCHES = 40
OURS, WEBDATASET, MOSAIC = "LatentStream", "webdataset", "mosaicml streaming"
BY_SAMPLE, BY_BATCH = "memory map, DataLoader", "memory map, DataLoader of whole batches"
TARGETS = {WEBDATASET: 2.0, MOSAIC: 1.0, BY_SAMPLE: 0.8}
TRAINING_CONFIG = "configs/train/cifar10-smd.yaml"
TRAINING_TARGET = 0.97

FORK = multiprocessing.get_context("fork")
Batches = Callable[[int], Iterator]
"""Functions from a number of workers to an endless iterator of batches."""


class MemoryMap(Dataset):
    """Moments in one memory-mapped array."""

    def __init__(self, path: Path, labels: np.ndarray) -> None:
        self.moments, self.labels = np.load(path, mmap_mode="r"), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.moments[index].copy()), self.labels[index]


class MemoryMapOfBatches(MemoryMap):
    """The same, read in whole batches with torch's ``__getitems__``."""

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.moments[indices]), torch.from_numpy(self.labels[indices])


def all_readers(manifest: Manifest, batch_size: int, folder: Path) -> dict[str, Batches]:
    """Return all readers. Formats other than the shards are written to ``folder``."""
    shards = [open_shard(manifest, item, mirror=False) for item in manifest.shards]
    moments = np.concatenate([shard.moments(np.arange(len(shard))) for shard in shards])
    labels = np.concatenate([shard.labels for shard in shards])
    np.save(folder / "moments.npy", moments)
    shape = ",".join(map(str, moments.shape[1:]))
    columns = {"moments": f"ndarray:float16:{shape}", "label": "int"}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for sample, label in zip(moments, labels):
            writer.write({"moments": sample, "label": int(label)})
    loading = {"batch_size": batch_size, "drop_last": True}

    def from_stream(workers: int) -> Iterator:
        yield from latent_loader(LatentStream(manifest, batch_size, images_total=2**60), workers)

    def from_webdataset(workers: int) -> Iterator:
        urls = [str(manifest.folder / shard["name"]) for shard in manifest.shards]
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), detshuffle=True, seed=0, empty_check=False)
        dataset = dataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER).decode().to_tuple("moments.npy", "cls")
        yield from wds.WebLoader(dataset.repeat().batched(batch_size), batch_size=None, num_workers=workers)

    def from_array(dataset_class: type[MemoryMap], collate_fn: Callable | None, workers: int) -> Iterator:
        dataset = dataset_class(folder / "moments.npy", labels)
        loader = DataLoader(
            dataset, shuffle=True, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate_fn, **loading
        )
        for _ in repeat(None):
            yield from loader

    def from_mosaic(workers: int) -> Iterator:
        streaming.base.util.clean_stale_shared_memory()
        dataset = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch_size)
        loader = streaming.StreamingDataLoader(dataset, num_workers=workers, persistent_workers=workers > 0, **loading)
        for _ in repeat(None):
            yield from loader

    return {
        OURS: from_stream,
        WEBDATASET: from_webdataset,
        BY_SAMPLE: lambda workers: from_array(MemoryMap, None, workers),
        BY_BATCH: lambda workers: from_array(MemoryMapOfBatches, lambda batch: batch, workers),
        MOSAIC: from_mosaic,
    }


def latents_per_second(batches: Batches, workers: int, batch_size: int, seconds: float) -> float:
    """Measure the speed for ``seconds`` in a process of its own, because mosaicml streaming leaves threads behind that slow
    down whatever runs next."""
    receiver, sender = FORK.Pipe(duplex=False)

    def measure() -> None:
        iterator = batches(workers)
        for _ in range(WARM_UP_BATCHES):
            next(iterator)
        count, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            next(iterator)
            count += 1
        sender.send(count * batch_size / passed)

    process = FORK.Process(target=measure)
    process.start()
    while not receiver.poll(1.0):
        if process.exitcode:
            raise SystemExit("a measurement failed")
    process.join(timeout=10)
    process.kill()
    return receiver.recv()


class Trainee:
    """A training run of the mixture of the CIFAR-10 benchmark that is advanced step by step."""

    def __init__(self, manifest: Manifest, autoencoder: str) -> None:
        data = [f"shards={manifest.folder}", f"autoencoder={autoencoder}", f"output={RESULT.with_suffix('.run')}"]
        config = load_config(TrainConfig, TRAINING_CONFIG, ["init_from=null", "mirror=false", *data])
        accelerator = Accelerator(mixed_precision="no")
        self.batch_size, self.images_seen, self.device = config.batch_size, 0, accelerator.device
        self.learner = Denoising(Run.open(config, accelerator))
        self.learner.model.prepare(accelerator)

    def images_per_second(self, batches: Iterator[LatentBatch], steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            self.learner.step(next(batches).to(self.device), self.images_seen, learning_rate=1e-4)
            self.images_seen += self.batch_size
        return steps * self.batch_size / (time.perf_counter() - started)


def training_rates(manifest: Manifest, autoencoder: str, rounds: int, steps: int) -> list[dict[str, float]]:
    trainee = Trainee(manifest, autoencoder)
    stream = LatentStream(manifest, trainee.batch_size, images_total=2**60)
    sources = {"one batch in memory": repeat(stream.batch_at(0)), OURS: iter(latent_loader(stream, num_workers=0))}
    trainee.images_per_second(sources[OURS], 2)
    rows = []
    for _ in tqdm(range(rounds), desc="training", unit="round"):
        rows.append({name: trainee.images_per_second(batches, steps) for name, batches in sources.items()})
    return rows


def median_ratio(rows: list[dict[str, float]], one: str, other: str) -> float:
    return round(statistics.median(row[one] / row[other] for row in rows), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", default="outputs/cifar10/plain-latents", help="folder of labelled shards without mirrored encodings"
    )
    parser.add_argument("--autoencoder", default="outputs/cifar10/autoencoder", help="autoencoder that made the shards")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    parser.add_argument("--training-steps", type=int, default=20, help="steps of each measurement")
    arguments = parser.parse_args()
    manifest = Manifest.load(arguments.shards)
    rates: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        readers = all_readers(manifest, arguments.batch_size, Path(folder))
        for workers in WORKERS:
            rates[workers] = []
            for _ in range(arguments.rounds):
                row = {
                    name: latents_per_second(batches, workers, arguments.batch_size, arguments.seconds)
                    for name, batches in readers.items()
                }
                rates[workers].append(row)
                print(f"{workers} workers: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in row.items()), flush=True)
    training = training_rates(manifest, arguments.autoencoder, arguments.rounds, arguments.training_steps)
    targets = [
        target(f"LatentStream / {name}, {workers} workers", f">= {wanted}", median_ratio(rates[workers], OURS, name))
        for name, wanted in TARGETS.items()
        for workers in WORKERS
    ]
    in_training = median_ratio(training, OURS, "one batch in memory")
    targets.append(target("training speed / on one batch in memory", f">= {TRAINING_TARGET}", in_training))
    result = {
        "command": " ".join(["python", "benchmarks/stream.py", *sys.argv[1:]]),
        "samples": manifest.count,
        "moments_shape": manifest.metadata["moments_shape"],
        "batch_size": arguments.batch_size,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "webdataset", "mosaicml-streaming", "numpy")},
        "latents_per_second": rates,
        "training_images_per_second": training,
        "targets": targets,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(result)
    RESULT.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def table(result: dict) -> str:
    rates = result["latents_per_second"]
    lines = [
        f"Latents per second, median of {len(rates[0])} rounds, for {result['samples']:,} samples of shape "
        f"{'x'.join(map(str, result['moments_shape']))} in batches of {result['batch_size']} on {result['cores']} cores "
        f"(`{result['command']}`)",
        "",
        "| workers | " + " | ".join(map(str, rates)) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for name in rates[0][0]:
        medians = [statistics.median(row[name] for row in rows) for rows in rates.values()]
        lines.append(f"| {name} | " + " | ".join(f"{median:,.0f}" for median in medians) + " |")
    return "\n".join(lines + target_table(result["targets"])) + "\n"


if __name__ == "__main__":
    main()
