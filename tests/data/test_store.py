"""Object stores: an S3 server on loopback behind a proxy that injects faults, memory://, and a web server."""

import functools
import http.server
import shutil
import sys
import threading

import pytest
from faulty_store import FAULTS, LOOPBACK, Fault
from fsspec.registry import _registry

from ldm_smd.data import store
from ldm_smd.errors import UserError
from tests.stores import check_batches, check_images, write_image_tars

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def web(tmp_path):
    """Folder and URL of a web server."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer((LOOPBACK, 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield folder, f"http://{LOOPBACK}:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("url", ["s3://b/x", "gs://b", "https://host/x.tar", "http://host", "hf://datasets/a/b", "memory://x"])
def test_urls_are_remote(url):
    assert store.is_remote(url)


@pytest.mark.parametrize(
    "path", ["/a/b", "a", "C:\\x", "C://x", "datasets:mnist", "pipe:cat x", "nothing://x", "file:///x", "x.tar"]
)
def test_other_names_are_not_remote(path):
    assert not store.is_remote(path)


def test_printed_urls_contain_no_secrets():
    text = store.without_credentials(
        "GET https://me:secret@host/a/b.tar?X-Amz-Signature=abc&x=1 failed, 's3://key:other@bucket/x?y=z'"
    )
    assert text == "GET https://host/a/b.tar failed, 's3://bucket/x'"
    with pytest.raises(UserError, match=r"^shards: expected a URL without .*, found one at https://host/x$"):
        store.require_no_credentials("https://host/x?X-Amz-Signature=abc", "shards")


def test_upload_and_download(bucket, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(CONTENT)
    url = f"{bucket}/folder/a.bin"
    assert store.stat(url, "shards") is None
    store.upload(source, url, "shards")
    found = store.stat(url, "shards")
    assert (found.size, found.name) == (len(CONTENT), "a.bin") and found.stamp
    store.download(url, copy, "shards", len(CONTENT))
    assert copy.read_bytes() == store.read_bytes(url, "shards") == CONTENT
    source.write_bytes(b"[1")
    store.upload(source, f"{bucket}/folder/b.json", "shards")
    assert store.read_json(f"{bucket}/folder/b.json", "shards") == {} == store.read_json(f"{bucket}/none.json", "shards")
    assert [each.name for each in store.list_files(f"{bucket}/folder", "shards")] == ["a.bin", "b.json"]
    assert store.list_files(f"{bucket}/folder", "shards", "*.bin") == [found]
    source.write_bytes(b"another")
    store.upload(source, url, "shards")
    assert store.stat(url, "shards").stamp != found.stamp


def test_a_multipart_upload_appears_when_complete(bucket, proxy, tmp_path, monkeypatch):
    """The first upload fails, because a part fails in all attempts. The second succeeds."""
    source = tmp_path / "source"
    with open(source, "wb") as file:
        file.truncate(110 * 2**20)  # more than two parts of 50 MB, the size of s3fs
    url = f"{bucket}/large.bin"
    monkeypatch.setattr(store, "RETRIES", store.Retries(attempts=1))
    proxy.faults.extend([Fault("500", "partNumber=2", "PUT")] * 10)
    with pytest.raises(UserError, match=r"^output: expected to write s3://.*large.bin, found"):
        store.upload(source, url, "output")
    assert store.stat(url, "output") is None and proxy.injected["500"] >= 1
    proxy.faults.clear()
    store.upload(source, url, "output")
    assert store.stat(url, "output").size == 110 * 2**20


@pytest.mark.parametrize("kind", FAULTS[:4])
def test_failed_requests_are_repeated(bucket, proxy, tmp_path, kind):
    (tmp_path / "source").write_bytes(CONTENT)
    store.upload(tmp_path / "source", f"{bucket}/x", "shards")
    proxy.faults.extend([Fault(kind)] * 3)
    store.download(f"{bucket}/x", tmp_path / "copy", "shards", len(CONTENT))
    assert (tmp_path / "copy").read_bytes() == CONTENT and proxy.injected[kind] == 3
    if kind != "cut":  # the server does not accept a request with an incomplete body
        proxy.faults.extend([Fault(kind, method="PUT")] * 3)
        store.upload(tmp_path / "source", f"{bucket}/y", "output")
        assert store.read_bytes(f"{bucket}/y", "shards") == CONTENT


def test_an_outage_of_the_server_is_survived(bucket, proxy, tmp_path):
    (tmp_path / "source").write_bytes(CONTENT)
    store.upload(tmp_path / "source", f"{bucket}/x", "shards")
    back = proxy.go_offline(0.5)
    assert store.read_bytes(f"{bucket}/x", "shards", store.Retries(first=0.1)) == CONTENT
    back.join()


@pytest.mark.parametrize("kind", ["refuse", "500", "503"])
def test_it_gives_up_with_one_line(bucket, proxy, kind):
    proxy.faults.extend([Fault(kind)] * 1000)
    with pytest.raises(UserError, match=r"^shards: expected to read s3://bucket[^ ]*/x, found after 2 attempts: .+$") as error:
        store.read_bytes(f"{bucket}/x", "shards", store.Retries(attempts=2, first=0.01))
    assert "secret" not in str(error.value)


def test_missing_buckets_credentials_and_packages_give_one_line(bucket, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^output: expected a writable URL, found s3://no-such-bucket/x: .*bucket"):
        store.upload(tmp_path / "x", "s3://no-such-bucket/x", "output")
    assert store.stat("s3://no-such-bucket/x", "shards") is None
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store.store_of(bucket, "shards")[0].clear_instance_cache()
    with pytest.raises(UserError, match=r"^shards: expected to read s3://.*, found: Unable to locate credentials"):
        store.read_bytes(f"{bucket}/x", "shards")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)  # in case another test has imported it
    with pytest.raises(
        UserError, match=r"expected the package that reads gs:// \(pip install 'ldm_smd\[gcs\]'\), found it missing"
    ):
        store.read_bytes("gs://bucket/x", "shards")


def test_files_at_web_servers(web, tmp_path):
    folder, url = web
    (folder / "x.tar").write_bytes(CONTENT)
    assert store.stat(f"{url}/x.tar", "shards").size == len(CONTENT) and store.stat(f"{url}/y", "shards") is None
    store.download(f"{url}/x.tar", tmp_path / "copy", "shards", len(CONTENT))
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert [each.name for each in store.list_files(url, "shards", "*.tar")] == ["x.tar"]
    with pytest.raises(FileNotFoundError):
        store.read_bytes(f"{url}/y?signature=1", "shards")


def test_shards_and_images_at_web_servers(web, shards, image_folder, tmp_path):
    folder, url = web
    shutil.copytree(shards, folder / "latents")
    (folder / "images").mkdir()
    write_image_tars(image_folder, folder / "images")
    check_batches(f"{url}/latents", shards, tmp_path / "cache")
    check_images(f"{url}/images", folder / "images", tmp_path / "cache")


def test_the_memory_store(tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    store.upload(tmp_path / "x", "memory://store/x", "output")
    assert store.read_bytes("memory://store/x", "shards") == CONTENT
    assert [each.name for each in store.list_files("memory://store", "shards")] == ["x"]
