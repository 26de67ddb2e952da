"""tools/encode.py: images -> latent shards, by any number of processes, which may be stopped and restarted at any time.

The work follows from the input alone: shard k holds the k-th slice of the images, sorted and then mixed with a fixed seed
(mixing.py), and worker i of n takes the i-th of n runs of shards. Workers never talk to each other. Each shard is whole or
absent under its name, in a folder as in an object store, and then confirmed by a record beside it. A restart skips shards that
match their record. The worker that finds every record writes the manifest, which is the same whoever encoded what.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from tqdm import tqdm

from ..autoencoder import FrozenAutoencoder
from ..device import pick_device
from ..errors import UserError
from ..files import sha256
from ..models.clip import ClipEncoder
from ..progress import progress
from .images import Pictures, read_pictures
from .output import Output, output_at
from .plan import Plan
from .settings import EncodeConfig
from .shards import DTYPE, EMBEDDING, FIELDS, FORMAT, MANIFEST, ChannelStatistics, Manifest, ShardStatistics, index_sha256
from .tar_index import index_tar

PLAN = "plan.json"
OF_PICTURES = ("pictures", "pictures_sha256", "files_sha256")
NOT_IN_MANIFEST = ("format", "pictures", "files_sha256")
"""Settings of the plan that stay out of the manifest: a copy of the images, with other modification times, has the same one."""
READERS = 16
"""Threads that read records."""
AHEAD = 2
"""Batches that are encoded, or wait for that, while one is written."""


class EncodedBatch(NamedTuple):
    """Images of one shard, with float16 moments of them, and then of the mirrored ones, and embeddings, where asked for."""

    shard: int
    pictures: Pictures
    moments: list[np.ndarray]
    embeddings: np.ndarray | None


def encode(config: EncodeConfig) -> Manifest | None:
    """Encode this worker's shards to ``config.output``; if all shards are there then, write the manifest and return it.

    Raises UserError where ``output`` holds something else, or a run with other settings.
    """
    worker, workers = which_worker(config.worker)
    writer = f"worker-{worker}-of-{workers}-"
    output = output_at(config.output, writer)
    with output.claimed(writer):
        there = output.sizes()
        check_unused(output, there)
        device = pick_device(config.device)
        autoencoder = FrozenAutoencoder.from_pretrained(config.autoencoder).to(device)
        if config.images.resolution % autoencoder.factor:
            raise UserError(
                f"images.resolution: expected a multiple of {autoencoder.factor}, by which {config.autoencoder} divides, found "
                f"{config.images.resolution}"
            )
        clip = None if config.embedding is None else ClipEncoder.of(config.embedding, device, "embedding")
        plan = Plan.of(config, autoencoder, clip, (worker, workers))
        claim(output, plan, new=PLAN not in there)
        shards = plan.shards_of(worker, workers)
        missing = [shard for shard in shards if not finished(output, plan, shard, there)]
        if len(missing) < len(shards):
            print(f"{len(shards) - len(missing)} of {len(shards)} shards are there already", file=sys.stderr)
        if missing:
            total, hidden = sum(map(plan.count, missing)), int(os.environ.get("LOCAL_RANK", 0)) > 0
            try:
                with progress(total, 0, "encode", disable=hidden) as bar:
                    batches = encoded_batches(plan, missing, autoencoder, clip, config)
                    for shard, group in groupby(batches, key=attrgetter("shard")):
                        write_shard(output, plan, shard_name(plan, shard), group, bar)
                output.flush()
            except OSError as error:  # while writing: an unreadable image raises none
                raise UserError(
                    f"output: expected to write the shards to {output}, found {error}; run again to go on"
                ) from error
        if write_manifest(output, plan, config.images.strict):
            return Manifest.load(config.output)
        return None


def which_worker(worker: str | None) -> tuple[int, int]:
    """Return (i, n) of "i/n"; of None those that torchrun and accelerate launch put in the environment, or else (0, 1)."""
    if worker is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    index, _, count = worker.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"worker: expected i/n with i from 0 to n - 1, as in 0/8, found {worker!r}")
    return int(index), int(count)


def shard_name(plan: Plan, shard: int) -> str:
    return plan.path(Path(), shard).name


def record_name(plan: Plan, shard: int) -> str:
    return plan.path(Path(), shard).with_suffix(".json").name


def check_unused(output: Output, there: dict[str, int]) -> None:
    """Raise UserError where ``output`` holds files, but of no run."""
    if PLAN not in there and there:
        raise UserError(f"output: expected a new or empty folder, or an unfinished run's, found other files in {output}")


def claim(output: Output, plan: Plan, new: bool) -> None:
    """Check that plan.json is this plan; write it into a ``new`` place, which had none, unless another worker did meanwhile."""
    there = output.read(PLAN)
    if new and not there:
        with output.write(PLAN) as temporary:
            temporary.write_text(json.dumps(plan.settings, indent=1), encoding="utf-8")
        output.flush()
        there = output.read(PLAN)
    for name, value in json.loads(json.dumps(plan.settings)).items():
        if there.get(name) != value and name in OF_PICTURES:
            raise UserError(
                f"output: expected a new folder, or one of the same pictures, found {output} with others: the number, names, "
                "labels, sizes or modification times in images.source differ"
            )
        if there.get(name) != value:
            raise UserError(
                f"output: expected a new folder, or one of the same run, found {output} with another {name} "
                f"({json.dumps(there.get(name))[:80]} there, {json.dumps(value)[:80]} here)"
            )


def finished(output: Output, plan: Plan, shard: int, there: dict[str, int]) -> bool:
    """Tell whether the shard is there as its record says; ``there`` are the files that were there at the start."""
    if not there.keys() >= {shard_name(plan, shard), record_name(plan, shard)}:
        return False
    record = output.read(record_name(plan, shard))
    return record.get("plan") == plan.sha256 and output.holds(record, there[shard_name(plan, shard)])


def encoded_batches(
    plan: Plan, shards: list[int], autoencoder: FrozenAutoencoder, clip: ClipEncoder | None, config: EncodeConfig
) -> Iterator[EncodedBatch]:
    """Yield the batches of the shards in order. Processes decode images and threads run the networks meanwhile."""
    todo = [(shard, batch) for shard in shards for batch in plan.batches(shard)]
    parts = read_pictures(plan.entries, config.images, [batch for _, batch in todo], config.num_workers)

    def encode_batch(shard: int, pictures: Pictures) -> EncodedBatch:
        pixels = pictures.pixels.to(autoencoder.device, non_blocking=True)
        views = (pixels, pixels.flip(3)) if config.mirror else (pixels,)
        moments = [autoencoder.encode_moments(view).half().cpu().numpy() for view in views] if len(pixels) else []
        embeddings = clip.images(pixels).half().cpu().numpy() if clip is not None and len(pixels) else None
        return EncodedBatch(shard, pictures, moments, embeddings)

    with batch_threads(autoencoder.device) as threads, ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[EncodedBatch]] = deque()
        for (shard, _), pictures in zip(todo, parts):
            waiting.append(pool.submit(encode_batch, shard, pictures))
            if len(waiting) > threads + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def batch_threads(device: torch.device) -> Iterator[int]:
    """Give the number of batches that are encoded at a time: on a GPU 1; on a CPU as many as torch has threads, which it then
    runs with one each. That is faster, as none waits for the others while images are decoded and written, and the result no
    longer depends on the number of threads, by which convolutions round."""
    threads = torch.get_num_threads()
    if device.type != "cpu":
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def write_shard(output: Output, plan: Plan, name: str, batches: Iterable[EncodedBatch], bar: tqdm) -> None:
    """Write the tar, and then the record that confirms it."""
    statistics, channels, skipped = ShardStatistics(), ChannelStatistics(), []
    dimensions = plan.settings.get("embedding", {}).get("dimensions")
    with output.write(name) as temporary:
        with open(temporary, "wb") as stream, wds.TarWriter(stream, mtime=0, user="", group="") as tar:
            for _, pictures, moments, embeddings in batches:
                skipped += pictures.unreadable
                if moments:
                    statistics.add(moments[0])
                    channels.add(moments[0])
                for row, (key, label) in enumerate(zip(pictures.keys, pictures.labels)):
                    sample = {"__key__": key, **{name: view[row] for name, view in zip(FIELDS, moments)}}
                    if embeddings is not None:
                        sample[EMBEDDING] = embeddings[row]
                    tar.write(sample if label is None else sample | {"cls": str(label)})
                bar.update(len(pictures.keys) + len(pictures.unreadable))
        index = index_tar(temporary, tuple(channels.shape), np.dtype(DTYPE), dimensions)
        record = {
            "plan": plan.sha256,
            "shard": {"name": name, **statistics.record(), "sha256": sha256(temporary)},
            "bytes": temporary.stat().st_size,
            "channels": channels.state(),
            "skipped": skipped,
            "index_sha256": index_sha256(index),
            "index": index,
        }
    with output.write(str(Path(name).with_suffix(".json"))) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")


def write_manifest(output: Output, plan: Plan, strict: bool) -> bool:
    """Write manifest.json from the records of all shards; False while some are missing. Raises UserError where ``strict`` and
    images were skipped, also by an earlier run."""
    names, there = [record_name(plan, shard) for shard in plan.shards], output.sizes()
    records: list[dict] = []
    if there.keys() >= set(names):
        with ThreadPoolExecutor(READERS) as readers:
            records += readers.map(
                lambda name: {key: value for key, value in output.read(name).items() if key != "index"}, names
            )
    missing = [shard for shard, name in zip(plan.shards, names) if name not in there]
    missing = missing or [shard for shard, record in zip(plan.shards, records) if record.get("plan") != plan.sha256]
    if missing:
        print(f"{len(missing)} of {len(plan.shards)} shards are still to come, first {missing[0]}: no manifest in {output} yet")
        return False
    statistics = ChannelStatistics()
    for record in records:
        statistics.merge(record["channels"])
    skipped = [item for record in records for item in record["skipped"]]
    if strict and skipped:
        raise UserError(
            f"images.strict: expected every picture to be readable, found {len(skipped)} skipped in {output}, first "
            f"{skipped[0]['name']}: {skipped[0]['reason']}"
        )
    if statistics.count == 0:
        raise UserError(
            f"images.source: expected readable pictures, found none of {len(plan.entries)} (first: {skipped[0]['reason']})"
        )
    metadata = {
        **{key: value for key, value in plan.settings.items() if key not in NOT_IN_MANIFEST},
        "dtype": np.dtype(DTYPE).name,
        "moments_shape": statistics.shape,
        "channel_mean": statistics.mean.tolist(),
        "channel_std": statistics.std.tolist(),
    }
    content = {"format": FORMAT, "metadata": metadata, "shards": [record["shard"] for record in records], "skipped": skipped}
    with output.write(MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    output.flush()
    for item in skipped[:20]:
        print(f"skipped {item['name']}: {item['reason']}", file=sys.stderr)
    print(f"{statistics.count} pictures in {len(records)} shards, {len(skipped)} skipped; wrote {output}")
    return True
