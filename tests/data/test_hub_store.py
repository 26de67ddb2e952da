"""hf:// URLs, with a hub of one repository on loopback behind a proxy that injects faults."""

import fsspec
import huggingface_hub.utils._http as hub_http
import pytest
from faulty_store import LOOPBACK, Fault, FaultyProxy
from huggingface_hub import HfFileSystem

from ldm_smd.data import store
from ldm_smd.errors import UserError
from tests.fake_hub import REPOSITORY, FakeHub
from tests.stores import check_batches, check_encoding_and_resuming, check_images, check_replacing, files_of, write_image_tars

CONTENT = bytes(range(256)) * 1000
URL = f"hf://datasets/{REPOSITORY}/latents"


@pytest.fixture
def hub(monkeypatch):
    """A hub with an empty repository. Requests are repeated at once."""
    hub = FakeHub(LOOPBACK)
    hub.proxy = FaultyProxy(hub.server_port)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.proxy.url, "token": False})
    monkeypatch.setattr(store, "RETRIES", store.Retries(attempts=3, first=0.01))
    monkeypatch.setattr(hub_http.time, "sleep", lambda seconds: None)
    HfFileSystem.clear_instance_cache()
    yield hub
    hub.proxy.stop()
    hub.shutdown()
    hub.server_close()


def test_files_are_uploaded_listed_read_and_replaced(hub, tmp_path):
    hub.files["latents/x"] = CONTENT
    assert [(each.name, each.size) for each in store.list_files(URL, "shards")] == [("x", len(CONTENT))]
    check_replacing(URL, CONTENT, tmp_path / "x")
    with pytest.raises(
        UserError, match=r"^output: expected a writable URL, found hf://datasets/no/such/x: .*repository not found"
    ):
        store.upload(tmp_path / "x", "hf://datasets/no/such/x", "output")


def test_a_file_replaced_after_it_was_listed_is_read(hub, tmp_path):
    hub.files["latents/x"] = CONTENT
    store.download(f"{URL}/x", tmp_path / "copy", "shards")
    hub.files["latents/x"] = b"shorter"
    store.download(f"{URL}/x", tmp_path / "copy", "shards")
    assert (tmp_path / "copy").read_bytes() == b"shorter"


@pytest.mark.parametrize("kind", ["refuse", "500", "503", "cut"])
def test_transient_faults_are_survived(hub, tmp_path, kind):
    hub.files["latents/x"] = CONTENT
    hub.proxy.faults.extend([Fault(kind, "/resolve/"), Fault(kind, "/tree/")])
    store.download(f"{URL}/x", tmp_path / "copy", "shards", len(CONTENT))
    assert (tmp_path / "copy").read_bytes() == CONTENT and not hub.proxy.faults


def test_it_gives_up_with_one_line(hub):
    hub.proxy.faults.extend([Fault("500")] * 1000)
    with pytest.raises(UserError, match=r"^shards: expected to read hf://\S+/x, found after 3 attempts: [^\n]+$"):
        store.read_bytes(f"{URL}/x", "shards")


def test_batches_equal_those_from_a_folder(hub, shards, tmp_path):
    hub.files.update({f"latents/{name}": content for name, content in files_of(shards).items()})
    hub.proxy.faults.extend([Fault("cut", ".tar"), Fault("wrong", ".tar"), Fault("500", ".json")])
    check_batches(URL, shards, tmp_path / "cache")
    assert not hub.proxy.faults


def test_images_equal_those_from_a_folder(hub, image_folder, tmp_path):
    write_image_tars(image_folder, tmp_path)
    hub.files.update({f"images/{name}": content for name, content in files_of(tmp_path).items()})
    check_images(f"hf://datasets/{REPOSITORY}/images", tmp_path, tmp_path / "cache")


def test_encoding_is_resumed(hub, image_folder, vae_folder, shards, monkeypatch):
    """Every file is one commit."""
    hub.files["README.md"] = b""

    def contents():
        return {name.partition("/")[2]: content for name, content in hub.files.items() if name.startswith("latents/")}

    def remove(name):
        del hub.files[f"latents/{name}"]

    check_encoding_and_resuming(URL, image_folder, vae_folder, shards, contents, remove, monkeypatch)
    assert sum(request.startswith("POST") and "/commit/" in request for request in hub.requests) == 8 + 3 + 1
