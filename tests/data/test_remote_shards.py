"""Latent shards in an object store give the same batches as in a folder, also with faults of the server."""

import json
import multiprocessing
import shutil
import threading

import numpy as np
import pytest
import torch
from faulty_store import FAULTS, Fault

from ldm_smd.config import load_config
from ldm_smd.data import store, stream
from ldm_smd.data.ahead import AHEAD, Prefetcher
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import CacheConfig, EncodeConfig, VerifyConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream, latent_loader
from ldm_smd.data.tar_index import index_tar
from ldm_smd.data.verify import verify
from ldm_smd.errors import UserError
from ldm_smd.training.fit_gaussian import fit_gaussian
from ldm_smd.training.loop import train
from ldm_smd.training.metrics_log import read_metrics
from ldm_smd.training.settings import FitGaussianConfig, TrainConfig, TrainMomentsConfig
from ldm_smd.training.train_moments import train_moments

READ = {"mirror": True, "seed": 3}


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory, image_folder, vae_folder):
    """Eight shards of three images each."""
    output = tmp_path_factory.mktemp("many") / "shards"
    settings = [
        f"images.source={image_folder}",
        "images.resolution=16",
        "mirror=true",
        f"autoencoder={vae_folder}",
        f"output={output}",
    ]
    encode(load_config(EncodeConfig, None, [*settings, "shard_size=3", "batch_size=3", "num_workers=0"]))
    return output


@pytest.fixture
def remote(many_shards, bucket):
    """The URL of a copy of ``many_shards``."""
    for path in many_shards.iterdir():
        if not path.name.startswith("."):
            store.upload(path, f"{bucket}/latents/{path.name}", "test")
    return f"{bucket}/latents"


@pytest.fixture
def cache(tmp_path):
    return CacheConfig(str(tmp_path / "cache"))


@pytest.fixture
def small_cache(tmp_path, many_shards):
    """A cache with room for two and a half shards."""
    return CacheConfig(str(tmp_path / "cache"), 2.5 * (many_shards / "latents-00000.tar").stat().st_size / 1e9)


def batches(manifest, total=44, workers=0, **options):
    return list(latent_loader(LatentStream(manifest, 4, total, **{**READ, **options}), workers))


def assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        assert torch.equal(a.moments, b.moments) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_those_from_a_folder(many_shards, remote, small_cache, workers):
    local, manifest = Manifest.load(many_shards), Manifest.load(remote, small_cache)
    assert manifest.sha256 == local.sha256 and manifest.count == local.count
    assert_equal(batches(manifest, workers=workers), batches(local))
    assert_equal(batches(manifest, images_seen=28), batches(local)[7:])
    cached_bytes = sum(cached.size for cached in manifest.cache.files())
    assert 0 < cached_bytes <= manifest.cache.limit_bytes


def test_ranks_together_give_the_batches_of_one_process(many_shards, remote, cache):
    manifest = Manifest.load(remote, cache)
    ranks = [batches(manifest, rank=rank, world_size=2) for rank in (0, 1)]
    for step, batch in enumerate(batches(Manifest.load(many_shards))):
        assert torch.equal(torch.cat([of_rank[step].moments for of_rank in ranks]), batch.moments)


def test_a_shard_is_fetched_once(remote, cache, proxy):
    manifest = Manifest.load(remote, cache)
    stream = LatentStream(manifest, 1, 22, **READ)
    before = proxy.requests.total()  # after the files were listed
    found = list(stream)
    assert proxy.requests.total() - before == 2 * 8 and len(found) == 22  # one request for each shard and record
    assert len(manifest.cache.files()) == 16
    list(LatentStream(manifest, 1, 44, **READ))
    assert proxy.requests.total() - before == 2 * 8 + 1  # the files are listed again


def test_shards_are_prefetched_in_order_up_to_a_limit():
    fetched, visits = [], [(10 * index, index) for index in range(8)]
    changed = threading.Condition()

    def fetch(shard):
        with changed:
            fetched.append(shard)
            changed.notify()
        if shard == 2:
            raise UserError("raised again by the reader")

    def wait_for(count):
        with changed:
            assert changed.wait_for(lambda: len(fetched) >= count, timeout=10)

    with Prefetcher(iter(visits), fetch).running() as ahead:
        wait_for(AHEAD)
        assert fetched == [0, 1, 2][:AHEAD]
        ahead.reached(0)
        wait_for(AHEAD + 1)
        ahead.reached(35)
        wait_for(AHEAD + 4)
        assert fetched == list(range(AHEAD + 4))
    assert not ahead._thread.join(timeout=10) and not ahead._thread.is_alive()


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_change_no_batch(many_shards, remote, small_cache, proxy, kind):
    manifest = Manifest.load(remote, small_cache)
    proxy.faults.extend([Fault(kind, ".tar"), Fault(kind, ".json"), Fault(kind, ".tar")])
    assert_equal(batches(manifest), batches(Manifest.load(many_shards)))
    assert proxy.injected[kind] == 3


def test_an_outage_of_the_server_is_survived(many_shards, remote, small_cache, proxy, monkeypatch):
    monkeypatch.setattr(store, "RETRIES", store.Retries(first=0.1, longest=1.0))
    manifest = Manifest.load(remote, small_cache)
    expected = batches(Manifest.load(many_shards))
    found, back = [], None
    for batch in LatentStream(manifest, 4, 44, **READ):
        found.append(batch)
        if len(found) == 5:
            back = proxy.go_offline(1.0)
    back.join()
    assert_equal(found, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_it_gives_up_with_one_line(remote, cache, proxy, workers, monkeypatch):
    monkeypatch.setattr(store, "RETRIES", store.Retries(attempts=2, first=0.01))
    manifest = Manifest.load(remote, cache)
    proxy.faults.extend([Fault("500", ".tar")] * 1000)
    with pytest.raises(
        UserError, match=r"^shards: expected to read s3://.*\.tar, found after 2 attempts: [^\n]*InternalError[^\n]*$"
    ):
        batches(manifest, workers=workers)


def read_all(remote, cache, seed, results):
    manifest = Manifest.load(remote, cache)
    results.put((seed, [batch.moments.numpy() for batch in LatentStream(manifest, 4, 44, seed=seed)]))


def test_two_processes_share_a_cache(many_shards, remote, small_cache, proxy):
    """They read in different orders, and the cache is smaller than what they need together."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=read_all, args=(remote, small_cache, seed, results)) for seed in (1, 2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(timeout=10)
    for seed, moments in found.items():
        expected = [batch.moments.numpy() for batch in LatentStream(Manifest.load(many_shards), 4, 44, seed=seed)]
        assert all(np.array_equal(a, b) for a, b in zip(moments, expected, strict=True))


@pytest.mark.parametrize("records", [True, False])
def test_copies_removed_before_they_are_opened_are_fetched_again(
    many_shards, remote, cache, removed_copies, monkeypatch, records
):
    """As by another process that needs the room: every copy is removed once, tars also if they are indexed."""
    indexed = []

    def counted(path, *args):
        indexed.append(path)
        return index_tar(path, *args)

    if not records:
        for record in many_shards.glob("latents-*.json"):
            file_system, path = store.store_of(f"{remote}/{record.name}", "test")
            file_system.rm_file(path)
    monkeypatch.setattr(stream, "index_tar", counted)
    manifest = Manifest.load(remote, cache)
    found = list(LatentStream(manifest, 4, 44, **READ).batches_at(range(0, 44, 4)))
    assert {name.rpartition(".")[2] for name in removed_copies} == ({"tar", "json"} if records else {"tar"})
    assert len([name for name in removed_copies if name.endswith(".tar")]) == len(manifest.shards)
    assert not indexed if records else len(indexed) >= 2 * len(manifest.shards)
    assert_equal(found, batches(Manifest.load(many_shards)))


def test_missing_and_damaged_records_are_not_used(many_shards, remote, cache):
    """The tar is indexed instead."""
    record = json.loads((many_shards / "latents-00000.json").read_text())
    record["index"]["labels"][0] ^= 1
    damaged = many_shards.parent / "damaged.json"
    damaged.write_text(json.dumps(record))
    store.upload(damaged, f"{remote}/latents-00000.json", "test")
    file_system, path = store.store_of(f"{remote}/latents-00001.json", "test")
    file_system.rm_file(path)
    assert_equal(batches(Manifest.load(remote, cache)), batches(Manifest.load(many_shards)))


def test_missing_and_invalid_manifests_give_one_line(remote, bucket, cache, tmp_path):
    with pytest.raises(UserError, match=rf"^shards: expected a folder with manifest.json, found none in {bucket} "):
        Manifest.load(bucket, cache)
    with pytest.raises(UserError, match=r"^shards: expected a folder with manifest.json, found none in s3://no-such-bucket "):
        Manifest.load("s3://no-such-bucket", cache)
    with pytest.raises(UserError, match=r"^shards: expected a URL without user, password .*, found one at s3://bucket/x$"):
        Manifest.load("s3://key:secret@bucket/x", cache)
    (tmp_path / "manifest.json").write_text("[]")
    store.upload(tmp_path / "manifest.json", f"{bucket}/other/manifest.json", "test")
    with pytest.raises(
        UserError, match=r"^shards: expected a manifest of latent shards in s3://.*/other/manifest.json, found: "
    ):
        Manifest.load(f"{bucket}/other", cache)
    file_system, path = store.store_of(f"{remote}/latents-00001.tar", "test")
    file_system.rm_file(path)
    with pytest.raises(
        UserError, match=rf"^shards: expected latents-00001.tar in {remote}, as its manifest says, found no such"
    ):
        LatentStream(Manifest.load(remote, cache), 4, 8)


def test_training_equals_that_from_a_folder(many_shards, remote, vae_folder, train_config, tmp_path, proxy):
    """Weights and log are equal, and no file contains the secret key."""
    local = train(train_config(f"shards={many_shards}", f"output={tmp_path / 'local'}"))
    settings = [f"shards={remote}", f"shards_cache.folder={tmp_path / 'cache'}", f"output={tmp_path / 'remote'}"]
    proxy.faults.extend(Fault(kind, ".tar") for kind in FAULTS)
    found = train(train_config(*settings))
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (found / weights).read_bytes() == (local / weights).read_bytes() and not proxy.faults
    logs = [read_metrics(tmp_path / name / "metrics.jsonl")[:4] for name in ("local", "remote")]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert all(0 <= line["data_wait_share"] <= 1 for line in logs[1])
    texts = [path.read_bytes() for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert texts and not any(b"a-very-secret-key" in text for text in texts)


def test_other_tools_read_remote_shards(run, remote, many_shards, gaussian_folder, cache, tmp_path):
    remote_shards = [f"shards={remote}", f"shards_cache.folder={cache.folder}"]
    code, out, _ = run(VerifyConfig, verify, *remote_shards, f"sheet={tmp_path / 'sheet.png'}")
    assert code == 0 and "22 samples in 8 shards match their manifest" in out
    fit = [f"model={gaussian_folder}", "rank=4", "batch_size=5"]
    moments = [f"model={gaussian_folder}", "images_total=16", "batch_size=8"]
    for name, shards in (("local", [f"shards={many_shards}"]), ("remote", remote_shards)):
        assert run(FitGaussianConfig, fit_gaussian, *fit, *shards, f"output={tmp_path / name / 'fit'}")[0] == 0
        assert run(TrainMomentsConfig, train_moments, *moments, *shards, f"output={tmp_path / name / 'moments'}")[0] == 0
    for path in (tmp_path / "local").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "remote" / path.relative_to(tmp_path / "local")).read_bytes()


def test_verify_lists_the_differences(run, remote, many_shards, cache, tmp_path):
    shutil.copy(many_shards / "latents-00001.tar", tmp_path / "other.tar")
    store.upload(tmp_path / "other.tar", f"{remote}/latents-00000.tar", "test")
    store.upload(tmp_path / "other.tar", f"{remote}/latents-00009.tar", "test")
    code, out, error = run(VerifyConfig, verify, f"shards={remote}", f"shards_cache.folder={cache.folder}")
    assert code == 2 and error.endswith("found 2 differences")
    assert "latents-00000.tar with sha256" in out and "latents-00009.tar: not in the manifest" in out
    assert load_config(TrainConfig, None, ["shards=x", "autoencoder=x", "output=x"]).shards_cache.bytes == 10**11
