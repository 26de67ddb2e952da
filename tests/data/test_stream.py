import json
import multiprocessing
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import webdataset as wds

from ldm_smd.config import load_config
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream, latent_loader
from ldm_smd.errors import UserError


@pytest.fixture
def manifest(shards):
    return Manifest.load(shards)


def batches(manifest, **options):
    return list(latent_loader(LatentStream(manifest, **options), num_workers=0))


def test_every_epoch_has_every_sample_once_in_a_new_order(manifest):
    stream = LatentStream(manifest, batch_size=4, images_total=44)
    keys = [key for position in range(0, 44, 4) for key in stream.keys_at(position)]
    first, second = keys[:22], keys[22:]
    assert len(set(first)) == len(set(second)) == 22
    assert first != second


def test_batches_contain_the_samples_of_their_keys(manifest):
    stream = LatentStream(manifest, batch_size=22, images_total=22)
    batch, keys = stream.batch_at(0), stream.keys_at(0)
    paths = [str(manifest.folder / item["name"]) for item in manifest.shards]
    by_key = {sample["__key__"]: sample for sample in wds.WebDataset(paths, shardshuffle=False).decode()}
    for row, key in enumerate(keys):
        assert torch.equal(batch.moments[row], torch.from_numpy(by_key[key]["moments.npy"]))
        assert batch.labels[row] == by_key[key]["cls"] == ["disc", "square"].index(key.split("/")[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_give_the_batches_of_one_process(manifest, world_size):
    """Global batches do not depend on the number of ranks, and all ranks take the same number of steps."""
    alone = batches(manifest, batch_size=8, images_total=48, seed=3)
    ranks = [
        batches(manifest, batch_size=8, images_total=48, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert {len(of_rank) for of_rank in ranks} == {len(alone)} == {6}
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([of_rank[step].moments for of_rank in ranks]), batch.moments)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="not on this system")
def test_a_worker_ends_at_sigterm_of_its_own_process_only(manifest):
    expected, before = batches(manifest, batch_size=4, images_total=400), set(multiprocessing.active_children())
    loader = iter(latent_loader(LatentStream(manifest, batch_size=4, images_total=400), num_workers=1))
    found = [next(loader)]
    (worker,) = set(multiprocessing.active_children()) - before
    subprocess.run([sys.executable, "-c", f"import os, signal; os.kill({worker.pid}, signal.SIGTERM)"], check=True)
    found += loader
    assert len(found) == len(expected)
    assert all(torch.equal(a.moments, b.moments) for a, b in zip(found, expected))

    again = iter(latent_loader(LatentStream(manifest, batch_size=4, images_total=400), num_workers=1))
    next(again)
    (worker,) = set(multiprocessing.active_children()) - {worker, *before}
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


def test_a_resumed_stream_gives_the_remaining_batches(manifest):
    all_batches = batches(manifest, batch_size=4, images_total=60, mirror=True)
    for done in (0, 5, 7, 15):
        rest = batches(manifest, batch_size=4, images_total=60, mirror=True, images_seen=4 * done)
        assert len(rest) == len(all_batches) - done
        for a, b in zip(rest, all_batches[done:]):
            assert torch.equal(a.moments, b.moments) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_order(manifest, workers):
    stream = LatentStream(manifest, batch_size=4, images_total=30)
    plain = list(latent_loader(stream, 0))
    for a, b in zip(latent_loader(stream, workers), plain, strict=True):
        assert torch.equal(a.moments, b.moments)


def test_mirror_uses_the_mirrored_encoding_for_half_of_the_samples(manifest):
    plain = LatentStream(manifest, batch_size=22, images_total=22 * 20)
    mirrored = LatentStream(manifest, batch_size=22, images_total=22 * 20, mirror=True)
    count = 0
    for epoch in range(20):
        a, b = plain.batch_at(22 * epoch), mirrored.batch_at(22 * epoch)
        assert torch.equal(a.labels, b.labels)
        count += int((a.moments != b.moments).flatten(1).any(dim=1).sum())
    assert 0.4 < count / 440 < 0.6


@pytest.mark.parametrize("with_record", [True, False])
def test_shards_without_mirrored_encodings_contain_the_others(image_folder, vae_folder, manifest, tmp_path, with_record):
    settings = [f"images.source={image_folder}", "images.resolution=16", f"autoencoder={vae_folder}", "num_workers=0"]
    plain = encode(load_config(EncodeConfig, None, [*settings, f"output={tmp_path / 'plain'}", "mirror=false", "batch_size=4"]))
    if not with_record:
        (tmp_path / "plain/latents-00000.json").unlink()
    found, expected = (LatentStream(each, 22, 22) for each in (plain, manifest))
    by_key = dict(zip(found.keys_at(0), found.batch_at(0).moments))
    for key, moments in zip(expected.keys_at(0), expected.batch_at(0).moments):
        assert torch.allclose(by_key[key], moments, atol=1e-2)
    with pytest.raises(UserError, match="mirror: expected"):
        LatentStream(plain, 22, 22, mirror=True).batch_at(0)


def test_a_batch_size_that_ranks_cannot_share_is_refused(manifest):
    with pytest.raises(UserError, match="batch_size: expected a multiple of the 3 processes, found 8"):
        LatentStream(manifest, batch_size=8, images_total=8, world_size=3)


def test_damaged_and_missing_shards_give_one_line(shards, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    path = folder / "latents-00000.tar"
    intact = path.read_bytes()
    for damaged, message in (
        (intact[:2000], "shards: expected"),
        (b"not a tar" * 100, "shards: expected"),
        (intact[: len(intact) // 2], "shards: expected"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            LatentStream(Manifest.load(folder), batch_size=22, images_total=22).batch_at(0)
    path.unlink()
    with pytest.raises(UserError, match=r"shards: expected latents-00000\.tar in .*found no such file"):
        LatentStream(Manifest.load(folder), batch_size=2, images_total=2)


def test_labels_outside_the_classes_of_the_manifest_are_refused(shards, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    content = json.loads((folder / "manifest.json").read_text())
    content["metadata"]["classes"] = ["only one"]
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="shards: expected labels from 0 to 0, found 1"):
        LatentStream(Manifest.load(folder), batch_size=22, images_total=22).batch_at(0)
