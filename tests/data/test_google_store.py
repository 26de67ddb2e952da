"""gs:// URLs, with an emulator of Google Cloud Storage on loopback behind a proxy that injects faults."""

import importlib
import sys

import fsspec
import pytest
from faulty_store import LOOPBACK, Fault, FaultyProxy
from gcp_storage_emulator.server import create_server

from ldm_smd.data import store
from ldm_smd.errors import UserError
from tests.stores import check_batches, check_encoding_and_resuming, check_images, check_replacing, write_image_tars

CONTENT = bytes(range(256)) * 1000
URL = "gs://bucket/latents"


@pytest.fixture(scope="module")
def emulator():
    server = create_server(LOOPBACK, 0, in_memory=True)
    server.start()
    yield server._api._httpd.server_port
    server.stop()


@pytest.fixture
def google(emulator, monkeypatch):
    """The proxy in front of an empty bucket. Requests are repeated at once."""
    proxy = FaultyProxy(emulator)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # would ask for the bucket type by gRPC
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setattr(store, "RETRIES", store.Retries(attempts=3, first=0.01))
    gcsfs = importlib.import_module("gcsfs")
    gcsfs.GCSFileSystem.clear_instance_cache()
    monkeypatch.setattr(sys.modules["gcsfs.retry"], "min", lambda *seconds: 0.01, raising=False)  # its pauses
    bucket = store.store_of(URL, "test")[0]
    bucket.mkdir("bucket")
    yield proxy
    proxy.faults.clear()
    bucket.rm("bucket", recursive=True)
    proxy.stop()


def upload(folder, url=URL):
    for path in folder.glob("[!.]*"):
        store.upload(path, f"{url}/{path.name}", "test")


def test_files_are_uploaded_listed_read_and_replaced(google, tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    store.upload(tmp_path / "x", f"{URL}/x", "output")
    (tmp_path / "x").write_bytes(b"")
    store.upload(tmp_path / "x", f"{URL}/empty", "output")
    assert [(each.name, each.size) for each in store.list_files(URL, "shards")] == [("empty", 0), ("x", len(CONTENT))]
    check_replacing(URL, CONTENT, tmp_path / "x")
    with pytest.raises(UserError, match=r"^output: expected a writable URL, found gs://no-such-bucket/x: "):
        store.upload(tmp_path / "x", "gs://no-such-bucket/x", "output")


@pytest.mark.parametrize("kind", ["refuse", "500", "503", "cut"])
def test_transient_faults_are_survived(google, tmp_path, kind):
    (tmp_path / "x").write_bytes(CONTENT)
    if kind != "cut":  # the server does not accept a request with an incomplete body
        google.faults.append(Fault(kind, method="POST"))
    store.upload(tmp_path / "x", f"{URL}/x", "output")
    google.faults.append(Fault(kind, "alt=media"))
    store.download(f"{URL}/x", tmp_path / "copy", "shards", len(CONTENT))
    assert (tmp_path / "copy").read_bytes() == CONTENT and not google.faults


def test_it_gives_up_with_one_line(google, capfd, caplog):
    """Without the tracebacks that gcsfs logs, and without retries if access is denied."""
    google.faults.extend([Fault("500")] * 1000)
    with pytest.raises(UserError, match=r"^shards: expected to read gs://bucket/x, found after 3 attempts: [^\n]+$"):
        store.read_bytes("gs://bucket/x", "shards")
    google.faults.clear()
    google.faults.append(Fault("403"))
    with pytest.raises(UserError, match=r"^shards: expected to read gs://bucket/x, found: Forbidden: [^\n]+$"):
        store.read_bytes("gs://bucket/x", "shards")
    assert not google.faults and "Traceback" not in capfd.readouterr().err + caplog.text


def test_batches_equal_those_from_a_folder(google, shards, tmp_path):
    upload(shards)
    google.faults.extend([Fault("cut", ".tar"), Fault("wrong", ".tar"), Fault("500", ".json")])
    check_batches(URL, shards, tmp_path / "cache")
    assert not google.faults


def test_images_equal_those_from_a_folder(google, image_folder, tmp_path):
    write_image_tars(image_folder, tmp_path)
    upload(tmp_path, "gs://bucket/images")
    check_images("gs://bucket/images", tmp_path, tmp_path / "cache")


def test_encoding_is_resumed(google, image_folder, vae_folder, shards, monkeypatch):
    def contents():
        return {each.name: store.read_bytes(each.url, "test") for each in store.list_files(URL, "test")}

    def remove(name):
        store.store_of(URL, "test")[0].rm_file(f"bucket/latents/{name}")

    google.faults.extend([Fault("503", method="POST"), Fault("refuse", method="POST")])
    check_encoding_and_resuming(URL, image_folder, vae_folder, shards, contents, remove, monkeypatch)
    assert not google.faults
