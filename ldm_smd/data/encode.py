"""tools/encode.py: images -> latent shards, by any number of processes, which may be stopped and restarted at any time.

The work depends on the input alone. Shard k holds the k-th slice of the images, which are sorted and then shuffled with a fixed
seed (order.py). Worker i of n takes the i-th of n slices of the shards. Workers do not communicate. A shard appears under its
name only when it is complete, in a folder and in an object store. Then a record is written beside it. A restart skips shards
that match their record. The worker that finds all records writes the manifest, which does not depend on who encoded what.
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
from .images import ImageBatch, read_images
from .output import Output, output_at
from .plan import Plan
from .settings import EncodeConfig
from .shards import DTYPE, EMBEDDING, FIELDS, FORMAT, MANIFEST, ChannelStatistics, Manifest, ShardStatistics, index_sha256
from .tar_index import index_tar

PLAN = "plan.json"
IMAGE_SETTINGS = ("pictures", "pictures_sha256", "files_sha256")
NOT_IN_MANIFEST = ("format", "pictures", "files_sha256")
"""Settings of the plan that are not in the manifest, so that a copy of the images with other modification times gives the same
manifest."""
READER_THREADS = 16
"""Threads that read records."""
QUEUED_BATCHES = 2
"""Batches that wait to be encoded or written, in addition to those being encoded."""


class EncodedBatch(NamedTuple):
    """Images of one shard with their encodings.

    Attributes:
        moments: float16 moments of the images and, if they are stored, of the mirrored images, (b, 2 or 1, C, h, w) each.
        embeddings: float16, (b, D); None if they are not stored.
    """

    shard: int
    images: ImageBatch
    moments: list[np.ndarray]
    embeddings: np.ndarray | None


def encode(config: EncodeConfig) -> Manifest | None:
    """Encode this worker's shards to ``config.output``. If all shards are then complete, write the manifest and return it.
    It is not written again if nothing was left to do.

    Raises UserError if ``output`` holds other files, or a run with other settings.
    """
    worker, workers = parse_worker(config.worker)
    writer = f"worker-{worker}-of-{workers}-"
    output = output_at(config.output, writer)
    with output.claimed(writer):
        sizes = output.sizes()
        check_unused(output, sizes)
        device = pick_device(config.device)
        autoencoder = FrozenAutoencoder.from_pretrained(config.autoencoder).to(device)
        if config.images.resolution % autoencoder.factor:
            raise UserError(
                f"images.resolution: expected a multiple of {autoencoder.factor}, the downsampling factor of "
                f"{config.autoencoder}, found {config.images.resolution}"
            )
        clip = None if config.embedding is None else ClipEncoder.of(config.embedding, device, "embedding")
        plan = Plan.from_config(config, autoencoder, clip, (worker, workers))
        write_or_compare_plan(output, plan, new=PLAN not in sizes)
        shards = plan.shards_of(worker, workers)
        missing = [shard for shard in shards if not is_complete(output, plan, shard, sizes)]
        if len(missing) < len(shards):
            print(f"{len(shards) - len(missing)} of {len(shards)} shards are already complete", file=sys.stderr)
        if missing:
            total, hidden = sum(map(plan.count, missing)), int(os.environ.get("LOCAL_RANK", 0)) > 0
            try:
                with progress(total, 0, "encode", disable=hidden) as bar:
                    batches = encoded_batches(plan, missing, autoencoder, clip, config)
                    for shard, group in groupby(batches, key=attrgetter("shard")):
                        write_shard(output, plan, shard_name(plan, shard), group, bar)
                output.flush()
            except OSError as error:  # raised by writing only: unreadable images are skipped
                raise UserError(
                    f"output: expected to write the shards to {output}, found {error}; run again to continue"
                ) from error
        every = {name(plan, shard) for shard in plan.shards for name in (shard_name, record_name)}
        written = not missing and not config.images.strict and sizes.keys() >= {MANIFEST, *every}
        if written or write_manifest(output, plan, config.images.strict):
            return Manifest.load(config.output)
        return None


def parse_worker(worker: str | None) -> tuple[int, int]:
    """Return (i, n) for "i/n". None: rank and world size of torchrun or accelerate launch, or (0, 1) without them."""
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


def check_unused(output: Output, sizes: dict[str, int]) -> None:
    """Raise UserError if ``output`` holds files but no plan, so that they are not from a run of this tool."""
    if PLAN not in sizes and sizes:
        raise UserError(f"output: expected a new or empty folder, or one of an unfinished run, found other files in {output}")


def write_or_compare_plan(output: Output, plan: Plan, new: bool) -> None:
    """Write plan.json to a ``new`` output, unless another worker has done so. Raises UserError if the output has the plan
    of another run."""
    recorded = output.read(PLAN)
    if new and not recorded:
        with output.write(PLAN) as temporary:
            temporary.write_text(json.dumps(plan.settings, indent=1), encoding="utf-8")
        output.flush()
        recorded = output.read(PLAN)
    for name, value in json.loads(json.dumps(plan.settings)).items():
        if recorded.get(name) != value and name in IMAGE_SETTINGS:
            raise UserError(
                f"output: expected a new folder, or one of the same images, found {output} with other images: the number, "
                "names, labels, sizes or modification times in images.source differ"
            )
        if recorded.get(name) != value:
            raise UserError(
                f"output: expected a new folder, or one of the same run, found {output} with another {name} "
                f"({json.dumps(recorded.get(name))[:80]} there, {json.dumps(value)[:80]} here)"
            )


def is_complete(output: Output, plan: Plan, shard: int, sizes: dict[str, int]) -> bool:
    """Tell whether a shard exists and matches its record. ``sizes`` are those of all files at the start."""
    if not sizes.keys() >= {shard_name(plan, shard), record_name(plan, shard)}:
        return False
    record = output.read(record_name(plan, shard))
    return record.get("plan") == plan.sha256 and output.matches(record, sizes[shard_name(plan, shard)])


def encoded_batches(
    plan: Plan, shards: list[int], autoencoder: FrozenAutoencoder, clip: ClipEncoder | None, config: EncodeConfig
) -> Iterator[EncodedBatch]:
    """Yield the encoded batches of the shards in order. Processes decode images while threads run the networks."""
    todo = [(shard, batch) for shard in shards for batch in plan.batches(shard)]
    batches = read_images(plan.entries, config.images, [batch for _, batch in todo], config.num_workers)

    def encode_batch(shard: int, images: ImageBatch) -> EncodedBatch:
        pixels = images.pixels.to(autoencoder.device, non_blocking=True)
        views = (pixels, pixels.flip(3)) if config.mirror else (pixels,)
        moments = [autoencoder.encode_moments(view).half().cpu().numpy() for view in views] if len(pixels) else []
        embeddings = clip.images(pixels).half().cpu().numpy() if clip is not None and len(pixels) else None
        return EncodedBatch(shard, images, moments, embeddings)

    with encoding_threads(autoencoder.device) as threads, ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[EncodedBatch]] = deque()
        for (shard, _), images in zip(todo, batches):
            waiting.append(pool.submit(encode_batch, shard, images))
            if len(waiting) > threads + QUEUED_BATCHES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def encoding_threads(device: torch.device) -> Iterator[int]:
    """Yield the number of batches to encode at the same time.

    On a GPU, it is 1. On a CPU, it is the number of threads of torch, and each batch then runs on one thread. This is faster,
    because no thread waits for the others while images are decoded and written. It also makes the result independent of the
    number of threads, with which the rounding of convolutions changes.
    """
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
    """Write the tar of a shard, and then its record."""
    statistics, channels, skipped = ShardStatistics(), ChannelStatistics(), []
    dimensions = plan.settings.get("embedding", {}).get("dimensions")
    with output.write(name) as temporary:
        with open(temporary, "wb") as stream, wds.TarWriter(stream, mtime=0, user="", group="") as tar:
            for _, images, moments, embeddings in batches:
                skipped += images.unreadable
                if moments:
                    statistics.add(moments[0])
                    channels.add(moments[0])
                for row, (key, label) in enumerate(zip(images.keys, images.labels)):
                    sample = {"__key__": key, **{name: view[row] for name, view in zip(FIELDS, moments)}}
                    if embeddings is not None:
                        sample[EMBEDDING] = embeddings[row]
                    tar.write(sample if label is None else sample | {"cls": str(label)})
                bar.update(len(images.keys) + len(images.unreadable))
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
    """Write manifest.json from the records of all shards, and return whether it was written: False while shards are missing.

    Raises UserError if no image was readable, or if ``strict`` and an image was skipped, also by an earlier run.
    """
    names, existing = [record_name(plan, shard) for shard in plan.shards], output.sizes()
    records: list[dict] = []
    if existing.keys() >= set(names):
        with ThreadPoolExecutor(READER_THREADS) as pool:
            records += pool.map(lambda name: {key: value for key, value in output.read(name).items() if key != "index"}, names)
    missing = [shard for shard, name in zip(plan.shards, names) if name not in existing]
    missing = missing or [shard for shard, record in zip(plan.shards, records) if record.get("plan") != plan.sha256]
    if missing:
        print(f"{len(missing)} of {len(plan.shards)} shards are not complete yet, first {missing[0]}: no manifest in {output}")
        return False
    statistics = ChannelStatistics()
    for record in records:
        statistics.merge(record["channels"])
    skipped = [item for record in records for item in record["skipped"]]
    if strict and skipped:
        raise UserError(
            f"images.strict: expected every image to be readable, found {len(skipped)} skipped in {output}, first "
            f"{skipped[0]['name']}: {skipped[0]['reason']}"
        )
    if statistics.count == 0:
        raise UserError(
            f"images.source: expected readable images, found none of {len(plan.entries)} (first: {skipped[0]['reason']})"
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
    print(f"{statistics.count} images in {len(records)} shards, {len(skipped)} skipped; wrote {output}")
    return True
