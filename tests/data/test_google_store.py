"""gs:// URLs, before an emulator of Google Cloud Storage on loopback, with a proxy that has bad days."""

import importlib
import sys

import fsspec
import pytest
from faulty_store import LOOPBACK, Fault, FaultyProxy
from gcp_storage_emulator.server import create_server

from ldm_smd.data import store
from ldm_smd.errors import UserError
from tests.stores import batches_are_those_of_a_folder, encoding_goes_on, pictures_are_those_of_a_folder, tars_of

CONTENT = bytes(range(256)) * 1000
PLACE = "gs://bucket/latents"


@pytest.fixture(scope="module")
def emulator():
    server = create_server(LOOPBACK, 0, in_memory=True)
    server.start()
    yield server._api._httpd.server_port
    server.stop()


@pytest.fixture
def google(emulator, monkeypatch):
    """The proxy before an empty bucket; requests are tried again at once."""
    proxy = FaultyProxy(emulator)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for the bucket's kind by gRPC
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setattr(store, "RETRIES", store.Retries(attempts=3, first=0.01))
    gcsfs = importlib.import_module("gcsfs")
    gcsfs.GCSFileSystem.clear_instance_cache()
    monkeypatch.setattr(sys.modules["gcsfs.retry"], "min", lambda *seconds: 0.01, raising=False)  # its pauses
    bucket = store.store_of(PLACE, "test")[0]
    bucket.mkdir("bucket")
    yield proxy
    proxy.faults.clear()
    bucket.rm("bucket", recursive=True)
    proxy.stop()


def upload(folder, place=PLACE):
    for path in folder.glob("[!.]*"):
        store.upload(path, f"{place}/{path.name}", "test")


def test_files(google, tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    store.upload(tmp_path / "x", f"{PLACE}/x", "output")
    (tmp_path / "x").write_bytes(b"")
    store.upload(tmp_path / "x", f"{PLACE}/empty", "output")
    assert [(each.name, each.size) for each in store.listed(PLACE, "shards")] == [("empty", 0), ("x", len(CONTENT))]
    assert store.read_bytes(f"{PLACE}/x", "shards") == CONTENT and store.stat(f"{PLACE}/y", "shards") is None
    before = store.stat(f"{PLACE}/x", "shards")
    (tmp_path / "x").write_bytes(CONTENT[::-1])
    store.upload(tmp_path / "x", f"{PLACE}/x", "output")
    after = store.stat(f"{PLACE}/x", "shards")
    assert before.size == after.size and before.stamp and after.stamp and before.stamp != after.stamp
    with pytest.raises(FileNotFoundError):
        store.read_bytes(f"{PLACE}/y", "shards")
    with pytest.raises(UserError, match=r"^output: expected a place that can be written, found gs://no-such-bucket/x: "):
        store.upload(tmp_path / "x", "gs://no-such-bucket/x", "output")


@pytest.mark.parametrize("kind", ["refuse", "500", "503", "cut"])
def test_faults_pass(google, tmp_path, kind):
    (tmp_path / "x").write_bytes(CONTENT)
    if kind != "cut":  # a body cut in the middle has not been read by the server as a request
        google.faults.append(Fault(kind, method="POST"))
    store.upload(tmp_path / "x", f"{PLACE}/x", "output")
    google.faults.append(Fault(kind, "alt=media"))
    store.download(f"{PLACE}/x", tmp_path / "copy", "shards", len(CONTENT))
    assert (tmp_path / "copy").read_bytes() == CONTENT and not google.faults


def test_it_gives_up_with_one_line(google, capfd, caplog):
    """And without the tracebacks that gcsfs logs; at once where it may not read."""
    google.faults.extend([Fault("500")] * 1000)
    with pytest.raises(UserError, match=r"^shards: expected to read gs://bucket/x, found after 3 attempts: [^\n]+$"):
        store.read_bytes("gs://bucket/x", "shards")
    google.faults.clear()
    google.faults.append(Fault("403"))
    with pytest.raises(UserError, match=r"^shards: expected to read gs://bucket/x, found: Forbidden: [^\n]+$"):
        store.read_bytes("gs://bucket/x", "shards")
    assert not google.faults and "Traceback" not in capfd.readouterr().err + caplog.text


def test_batches_are_those_of_a_folder(google, shards, tmp_path):
    upload(shards)
    google.faults.extend([Fault("cut", ".tar"), Fault("wrong", ".tar"), Fault("500", ".json")])
    batches_are_those_of_a_folder(PLACE, shards, tmp_path / "cache")
    assert not google.faults


def test_pictures_are_those_of_a_folder(google, pictures, tmp_path):
    tars_of(pictures, tmp_path)
    upload(tmp_path, "gs://bucket/pictures")
    pictures_are_those_of_a_folder("gs://bucket/pictures", tmp_path, tmp_path / "cache")


def test_encoding_goes_on(google, pictures, vae_folder, shards, monkeypatch):
    def contents():
        return {each.name: store.read_bytes(each.url, "test") for each in store.listed(PLACE, "test")}

    remove = lambda name: store.store_of(PLACE, "test")[0].rm_file(f"bucket/latents/{name}")  # noqa: E731
    google.faults.extend([Fault("503", method="POST"), Fault("refuse", method="POST")])
    encoding_goes_on(PLACE, pictures, vae_folder, shards, contents, remove, monkeypatch)
    assert not google.faults
