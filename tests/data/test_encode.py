import json
import os
import shutil
import signal
import time
from pathlib import Path

import fsspec
import pytest
import torch
import webdataset as wds
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import load_config
from ldm_smd.data.encode import encode
from ldm_smd.data.entries import Entry
from ldm_smd.data.plan import INDEX, Plan
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.errors import UserError
from ldm_smd.files import claimed
from tests.forked import ROOT, script


@pytest.fixture
def settings(image_folder, vae_folder, tmp_path):
    """A function that returns the settings of the ``shards`` fixture, with output tmp_path/NAME."""
    common = [f"images.source={image_folder}", "images.resolution=16", "mirror=true", f"autoencoder={vae_folder}"]
    return lambda name: [*common, f"output={tmp_path / name}", "shard_size=8", "batch_size=4", "num_workers=0"]


@pytest.fixture
def encode_to(settings):
    return lambda name, *overrides: encode(load_config(EncodeConfig, None, [*settings(name), *overrides]))


@pytest.fixture
def evaluations(monkeypatch):
    """The batch sizes of all calls of the encoder."""
    calls, real = [], FrozenAutoencoder.encode_moments
    monkeypatch.setattr(FrozenAutoencoder, "encode_moments", lambda self, x: calls.append(len(x)) or real(self, x))
    return calls


def assert_same(folder, shards):
    """Assert that shards and manifest are equal byte by byte, and that no temporary file is left."""
    names = sorted(path.name for path in shards.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    names.remove(INDEX)
    for name in names:
        assert (folder / name).read_bytes() == (shards / name).read_bytes(), name


def test_the_bytes_do_not_depend_on_workers_or_threads(shards, encode_to, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        encode_to("again", "num_workers=2")
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert_same(tmp_path / "again", shards)


def test_unreadable_images_are_skipped_counted_and_listed(encode_to, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    manifest = encode_to("out", f"images.source={folder}")
    content = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest.count == 1 and manifest.classes == []
    assert [item["name"] for item in content["skipped"]] == [str(folder / "b.png")]
    out, err = capsys.readouterr()
    assert "1 skipped" in out and f"skipped {folder / 'b.png'}" in err


def test_no_manifest_without_a_readable_image(encode_to, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "b.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"images\.strict: expected every image to be readable"):
        encode_to("strict", f"images.source={folder}", "images.strict=true")
    assert [path.name for path in (tmp_path / "strict").glob("[!.]*")] == ["plan.json"]
    with pytest.raises(UserError, match="expected readable images"):
        encode_to("out", f"images.source={folder}")
    assert not (tmp_path / "out/manifest.json").exists()


def test_strict_refuses_images_that_an_earlier_run_skipped(encode_to, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    (folder / "b.png").write_bytes(b"not an image")
    encode_to("out", f"images.source={folder}")
    with pytest.raises(UserError, match=r"images\.strict: expected every image to be readable, found 1 skipped in .*b\.png"):
        encode_to("out", f"images.source={folder}", "images.strict=true")


def test_a_resolution_that_the_autoencoder_would_crop_is_refused(encode_to, tmp_path):
    with pytest.raises(UserError, match=r"images\.resolution: expected a multiple of 2, .*, found 17"):
        encode_to("out", "images.resolution=17")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("contents", [False, True])
def test_a_replaced_image_is_detected(image_folder, encode_to, tmp_path, contents):
    """By its modification time, or by its contents if ``compare_contents`` is set."""
    folder = shutil.copytree(image_folder, tmp_path / "copy")
    options = (f"images.source={folder}", f"compare_contents={str(contents).lower()}")
    encode_to("out", *options)
    manifest = (tmp_path / "out/manifest.json").read_bytes()
    replaced = folder / "disc/01.png"
    status = replaced.stat()
    replaced.write_bytes((folder / "disc/03.png").read_bytes())
    os.utime(replaced, ns=(status.st_atime_ns, status.st_mtime_ns + (0 if contents else 1_000_000)))
    with pytest.raises(UserError, match="output: expected a new folder, or one of the same images, found"):
        encode_to("out", *options)
    assert (tmp_path / "out/manifest.json").read_bytes() == manifest


def test_a_second_process_for_the_same_worker_is_refused(encode_to, tmp_path):
    with claimed(tmp_path / "out", worker="worker-0-of-2-", inside=True):
        with pytest.raises(UserError, match=r"output: expected no other run at .*out, found process \d+ of"):
            encode_to("out", "worker=0/2")
        encode_to("out", "worker=1/2")
    assert [path.name for path in tmp_path.glob("out/.*")] == [INDEX]


def test_a_folder_with_other_files_is_refused(encode_to, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/keep.txt").write_text("mine")
    with pytest.raises(UserError, match="output: expected a new or empty folder"):
        encode_to("out")
    assert (tmp_path / "out/keep.txt").read_text() == "mine"


def test_workers_split_the_shards_and_the_last_writes_the_manifest(shards, encode_to, tmp_path, evaluations):
    assert encode_to("out", "worker=1/2") is None
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["latents-00001.tar", "latents-00002.tar"]
    assert not (tmp_path / "out/manifest.json").exists()
    assert encode_to("out", "worker=0/2").count == 22
    assert sum(evaluations) == 2 * 22  # each image and its mirrored version once
    assert_same(tmp_path / "out", shards)


def test_processes_of_a_launcher_are_workers(shards, encode_to, tmp_path, monkeypatch):
    for rank in (2, 0, 1, 3):  # more processes than shards
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "4")
        found = encode_to("out")
        assert (found is not None) == (rank == 3)  # the last worker that has shards
    assert_same(tmp_path / "out", shards)


def test_a_restart_encodes_missing_and_damaged_shards(shards, encode_to, tmp_path, evaluations):
    encode_to("out")
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/latents-00000.tar").unlink()
    damaged = bytearray((tmp_path / "out/latents-00002.tar").read_bytes())
    damaged[700] ^= 1
    (tmp_path / "out/latents-00002.tar").write_bytes(damaged)
    evaluations.clear()
    encode_to("out")
    assert sum(evaluations) == 2 * (8 + 6)
    assert_same(tmp_path / "out", shards)
    evaluations.clear()
    assert encode_to("out").count == 22 and evaluations == []


@pytest.mark.slow
def test_a_killed_run_is_resumed(shards, settings, encode_to, tmp_path, fork):
    process = fork(script, ROOT / "tools/encode.py", *settings("out"))
    while process.poll() is None and not list(tmp_path.glob("out/.latents-*")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out/manifest.json").exists()
    encode_to("out")
    assert_same(tmp_path / "out", shards)


def test_images_in_a_store_give_the_same_shards(shards, image_folder, encode_to, tmp_path):
    """The cache must be large enough for the tars that are shuffled together, which would otherwise be fetched repeatedly."""
    files = sorted(image_folder.rglob("*.png"))
    store = fsspec.filesystem("memory")
    for number in range(3):
        with wds.TarWriter(str(tmp_path / "part.tar")) as tar:
            for file in files[number::3]:
                label = ("disc", "square").index(file.parent.name)
                tar.write({"__key__": f"{file.parent.name}/{file.stem}", "png": file.read_bytes(), "cls": str(label)})
        store.pipe_file(f"/of-encode/part-{number}.tar", (tmp_path / "part.tar").read_bytes())
        (tmp_path / f"part-{number}.tar").write_bytes((tmp_path / "part.tar").read_bytes())
    store.pipe_file("/of-encode/classes.json", b'["disc", "square"]')
    (tmp_path / "classes.json").write_text('["disc", "square"]')
    remote = ("images.source=memory://of-encode/part-*.tar", f"images.cache={tmp_path / 'cache'}", "shuffle_tars=2")
    encode_to("local", f"images.source={tmp_path}/part-?.tar", "shuffle_tars=2")
    assert encode_to("remote", *remote).classes == ["disc", "square"]
    for name in ("manifest.json", *(path.name for path in shards.glob("*.tar"))):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    with pytest.raises(UserError, match=r"images\.cache_gigabytes: expected .* for the 2 tars that are shuffled together"):
        encode_to("again", *remote, "images.cache_gigabytes=2e-5")
    with pytest.raises(UserError, match=r"images\.cache_gigabytes: expected .* for the largest tar"):
        encode_to("again", *remote, "images.cache_gigabytes=1e-9", "shuffle=false")
    encode_to("in-order", *remote, "images.cache_gigabytes=5e-5", "shuffle=false")


def test_a_run_with_other_settings_is_refused(encode_to, tmp_path):
    encode_to("out", "worker=0/2")
    with pytest.raises(UserError, match=r"another mirror \(true there, false here\)"):
        encode_to("out", "mirror=false")
    for setting in ("shard_size=9", "batch_size=5", "images.crop=pad", "images.background=black", "shuffle=false"):
        name = setting.partition("=")[0].removeprefix("images.").replace("shuffle", "shuffle_tars")
        with pytest.raises(UserError, match=f"another {name} "):
            encode_to("out", setting)
    for worker in ("2/2", "one", "-1/2", "1"):
        with pytest.raises(UserError, match="worker: expected i/n"):
            encode_to("out", f"worker={worker}")


def test_a_full_disk_gives_one_line_and_finished_shards_are_kept(shards, encode_to, tmp_path, monkeypatch):
    real, remaining = wds.TarWriter.write, [10]

    def write(self, sample):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(28, "No space left on device")
        return real(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(wds.TarWriter, "write", write)
        with pytest.raises(UserError, match=r"output: expected to write.*No space left.*run again"):
            encode_to("out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*latents*")) == ["latents-00000.json", "latents-00000.tar"]
    encode_to("out")
    assert_same(tmp_path / "out", shards)


@hypothesis_settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 50), st.integers(1, 9))
def test_every_image_has_one_position_for_any_number_of_workers(images, shard_size, batch_size, workers):
    plan = Plan([Entry(str(number), None, "") for number in range(images)], {}, shard_size, batch_size)
    by_worker = [plan.shards_of(worker, workers) for worker in range(workers)]
    assert sorted(shard for shards in by_worker for shard in shards) == list(plan.shards)
    positions = [position for shard in plan.shards for batch in plan.batches(shard) for position in batch]
    assert positions == list(range(images))
    for shard in plan.shards:
        batches = plan.batches(shard)
        assert all(0 < len(batch) <= batch_size for batch in batches)
        assert sum(map(len, batches)) == plan.count(shard) <= shard_size
        assert len({plan.path(Path("out"), shard) for shard in plan.shards}) == len(plan.shards)
