"""Problems of a plain webdataset 1.0.2 pipeline, all observed in experiments, that LatentStream does not have.

test_encode.py tests two more: a killed or failing writer leaves no tar under its final name, and the same images give the same
bytes.
"""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm_smd.config import load_config
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream, latent_loader

COUNT, SHARDS = 22, 3  # shards of 8, 8 and 6


@pytest.fixture
def manifest(shards):
    return Manifest.load(shards)


def keys(manifest, epochs, world_size=1, rank=0, batch_size=2, **options):
    """Return the keys that a rank sees in each epoch, in order."""
    stream = LatentStream(manifest, batch_size, epochs * COUNT, rank=rank, world_size=world_size, **options)
    found = [key for position in range(0, epochs * COUNT, batch_size) for key in stream.keys_at(position)]
    per_epoch = COUNT // world_size
    return [found[start : start + per_epoch] for start in range(0, len(found), per_epoch)]


def shard_of(manifest):
    return {
        key: number
        for number, item in enumerate(manifest.shards)
        for key in LatentStream(Manifest(manifest.folder, manifest.metadata, [item]), item["count"], item["count"]).keys_at(0)
    }


def test_the_order_of_shards_differs_between_epochs(manifest):
    """webdataset: shardshuffle gives every epoch the same order, with and without a seed."""
    number = shard_of(manifest)
    orders = {tuple(dict.fromkeys(number[key] for key in epoch)) for epoch in keys(manifest, 40)}
    assert len(orders) == 6


def test_epochs_differ_without_persistent_workers(manifest):
    """webdataset: detshuffle counts epochs in the worker process, which ends after each epoch."""
    loader = latent_loader(LatentStream(manifest, 2, 2 * COUNT), num_workers=2)
    assert not loader.persistent_workers
    labels = [int(label) for batch in loader for label in batch.labels]
    assert labels[:COUNT] != labels[COUNT:] and sorted(labels[:COUNT]) == sorted(labels[COUNT:])


def test_every_rank_sees_every_sample_over_several_epochs(manifest):
    """webdataset: split_by_node before the shuffle gives a rank the same shards in all epochs."""
    for rank in range(2):
        assert {key for epoch in keys(manifest, 20, world_size=2, rank=rank) for key in epoch} == set(shard_of(manifest))


@pytest.mark.parametrize("world_size", [3, 4, 8])
def test_ranks_take_equal_steps_for_any_number_of_shards(manifest, world_size):
    """webdataset: three ranks get 12, 12 and 8 samples, and ranks beyond the number of shards get none. Both hang training."""
    steps = [
        [len(batch.labels) for batch in LatentStream(manifest, 24, 72, rank=rank, world_size=world_size)]
        for rank in range(world_size)
    ]
    assert steps == [[24 // world_size] * 3] * world_size


def test_the_length_does_not_depend_on_workers(manifest):
    """webdataset: with_epoch(10) and four workers give 40 samples."""
    counts = {sum(len(batch.labels) for batch in latent_loader(LatentStream(manifest, 2, 10), n)) for n in (0, 1, 4)}
    assert counts == {10}


@pytest.mark.slow
def test_another_process_gives_the_same_order(manifest):
    """webdataset: without a seed, shuffle depends on the process and the time."""
    script = f"""
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream
stream = LatentStream(Manifest.load({str(manifest.folder)!r}), 22, 22)
print(*stream.keys_at(0), sep="\\n")
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert [found] == keys(manifest, 1)


def test_dots_in_names_do_not_merge_images(vae_folder, tmp_path):
    """webdataset: img.v1 and img.v2 become one sample with key img, and a.png and a.jpg one sample with two images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, grey in (("img.v1.png", 10), ("img.v2.png", 90), ("a.png", 160), ("a.jpg", 240)):
        Image.new("L", (16, 16), grey).save(folder / name)
    settings = [f"images.source={folder}", "images.resolution=16", f"autoencoder={vae_folder}", "num_workers=0"]
    manifest = encode(load_config(EncodeConfig, None, [*settings, f"output={tmp_path / 'out'}"]))
    stream = LatentStream(manifest, 4, 4)
    assert len(set(stream.keys_at(0))) == 4 and not any("." in key for key in stream.keys_at(0))
    means = stream.batch_at(0).moments[:, 0].flatten(1).numpy()
    assert len(np.unique(means, axis=0)) == 4
