"""tools/encode.py writes the same bytes to an object store as to a folder."""

import json

import pytest
from faulty_store import Fault

from ldm_smd.config import dump_config, load_config
from ldm_smd.data import encode as encode_module
from ldm_smd.data import store
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.errors import UserError
from tests.forked import ROOT, script


@pytest.fixture(scope="session")
def expected(shards):
    """The bytes of every file of a local encoding, by name."""
    return {path.name: path.read_bytes() for path in shards.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def settings(image_folder, vae_folder, bucket):
    """A function that returns the settings of the same encoding to the bucket, with overrides."""

    def build(*overrides):
        given = [
            f"images.source={image_folder}",
            "images.resolution=16",
            "mirror=true",
            f"autoencoder={vae_folder}",
            f"output={bucket}/latents",
        ]
        return load_config(EncodeConfig, None, [*given, "shard_size=8", "batch_size=4", "num_workers=0", *overrides])

    return build


def found(bucket):
    return {each.name: store.read_bytes(each.url, "test") for each in store.list_files(f"{bucket}/latents", "test")}


def test_the_files_equal_those_in_a_folder(settings, bucket, expected):
    manifest = encode(settings())
    assert manifest.count == 22 and manifest.folder == f"{bucket}/latents"
    assert found(bucket) == expected and len(expected) == 8
    assert not any(b"a-very-secret-key" in content for content in expected.values())


def test_a_run_lists_its_output_at_the_start_and_at_the_end(settings, monkeypatch):
    """Listing takes one request for each thousand files. Other workers may write files between the two. A run with nothing left
    to do lists once, and does not read all records again for the manifest."""
    listed, real = [], store.list_files
    monkeypatch.setattr(store, "list_files", lambda folder, *given: listed.append(folder) or real(folder, *given))
    for worker, count in (("0/2", 2), ("1/2", 4), ("1/2", 5), ("0/2", 6)):
        encode(settings(f"worker={worker}"))
        assert len(listed) == count


def test_another_plan_written_at_the_same_time_is_refused(settings, bucket, monkeypatch):
    """Here it is written after the output was listed."""
    real = encode_module.check_unused

    def check(*given):
        real(*given)
        store.store_of(bucket, "test")[0].pipe_file(f"{bucket}/latents/plan.json", b'{"shard_size": 5}')

    monkeypatch.setattr(encode_module, "check_unused", check)
    with pytest.raises(UserError, match=r"^output: expected a new folder, or one of the same .*, found s3://"):
        encode(settings())
    assert set(found(bucket)) == {"plan.json"}


def test_faults_change_nothing(settings, bucket, expected, proxy):
    proxy.faults.extend(Fault(kind, ".tar", "PUT") for kind in ("refuse", "500", "503"))
    proxy.faults.extend(Fault(kind, ".json", "PUT") for kind in ("refuse", "500", "503"))
    encode(settings())
    assert found(bucket) == expected and not proxy.faults


def test_a_failed_run_is_resumed(settings, bucket, expected, proxy, monkeypatch):
    """After a failed upload nothing more is uploaded, and the next run writes only the missing files."""
    monkeypatch.setattr(store, "RETRIES", store.Retries(attempts=2, first=0.01))
    proxy.faults.extend([Fault("500", "latents-00001.tar", "PUT")] * 4)
    with pytest.raises(
        UserError, match=r"^output: expected to write s3://.*latents-00001.tar, found after 2 attempts: .*Internal"
    ):
        encode(settings())
    assert set(found(bucket)) == {"plan.json", "latents-00000.tar", "latents-00000.json"}
    proxy.faults.clear()
    before = proxy.requests["PUT"]
    encode(settings())
    assert proxy.requests["PUT"] - before == 5 and found(bucket) == expected
    written, real = [], encode_module.write_shard
    monkeypatch.setattr(encode_module, "write_shard", lambda *given: written.append(given[2]) or real(*given))
    encode(settings())
    assert written == []
    for name, content in (("latents-00000.tar", b"other bytes"), ("latents-00002.json", b"{}")):
        store.store_of(bucket, "test")[0].pipe_file(f"{bucket}/latents/{name}", content)
    encode(settings())
    assert written == ["latents-00000.tar", "latents-00002.tar"] and found(bucket) == expected


def test_workers_split_the_shards(settings, bucket, expected, fork, tmp_path):
    processes = []
    for worker in ("0/2", "1/2"):
        path = tmp_path / f"worker-{worker[0]}.yaml"
        path.write_text(dump_config(settings(f"worker={worker}")))
        processes.append(fork(script, ROOT / "tools/encode.py", "--config", path))
    errors = [process.output() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert found(bucket) == expected


def test_the_output_of_another_run_is_refused(settings, bucket):
    encode(settings("worker=0/2"))
    with pytest.raises(
        UserError, match=r"^output: expected a new folder, or one of the same run, found s3://.* another batch_size"
    ):
        encode(settings("batch_size=2"))
    assert json.loads(found(bucket)["plan.json"])["batch_size"] == 4 and "manifest.json" not in found(bucket)
    store.store_of(bucket, "test")[0].pipe_file(f"{bucket}/other/file.txt", b"x")
    with pytest.raises(UserError, match=r"^output: expected a new or empty folder, .* found other files in s3://.*/other$"):
        encode(settings(f"output={bucket}/other"))


@pytest.mark.parametrize(
    "output, message",
    [
        (
            "s3://no-such-bucket/x",
            r"output: expected a writable URL, found s3://no-such-bucket/x/plan.json: .*bucket",
        ),
        (
            "https://host/x",
            r"output: expected a folder, or a writable store \(s3://, gs://, hf://\), found https://host/x",
        ),
        ("s3://key:secret@bucket/x", r"output: expected a URL without user, password .*, found one at s3://bucket/x"),
    ],
)
def test_outputs_that_cannot_be_written_give_one_line(settings, output, message):
    with pytest.raises(UserError, match=f"^{message}"):
        encode(settings(f"output={output}"))
