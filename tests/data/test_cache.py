"""FileCache, tested with an S3 server on loopback behind a proxy that injects faults."""

import errno
import hashlib
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from faulty_store import FAULTS, Fault

from ldm_smd.data import store
from ldm_smd.data.cache import FileCache
from ldm_smd.errors import UserError

SIZE = 100_000


@pytest.fixture
def files(bucket, tmp_path):
    """Five files in a bucket: (url, sha256, content) of each."""
    made = []
    for index in range(5):
        content = np.random.default_rng(index).bytes(SIZE)
        (tmp_path / "source").write_bytes(content)
        store.upload(tmp_path / "source", f"{bucket}/file-{index}.tar", "test")
        made.append((f"{bucket}/file-{index}.tar", hashlib.sha256(content).hexdigest(), content))
    return made


@pytest.fixture
def cache(tmp_path):
    return FileCache(tmp_path / "cache", 3 * SIZE)


def temporary_files(cache):
    return [path.name for path in cache.folder.iterdir() if path.name.startswith(".")]


def test_a_file_is_fetched_once(files, cache, proxy):
    url, digest, content = files[0]
    assert cache.fetch(url, digest, SIZE).read_bytes() == content
    requests = proxy.requests["GET"]
    again = FileCache(cache.folder, SIZE).fetch(url, digest, SIZE)
    assert again.read_bytes() == content and proxy.requests["GET"] == requests and temporary_files(cache) == []
    assert cache.fetch("/a/local/path") == again.__class__("/a/local/path")


def test_a_file_with_another_stamp_gets_another_copy(files, cache, bucket, tmp_path):
    url, _, content = files[0]
    before = cache.fetch(url, stamp=store.stat(url, "test").stamp)
    (tmp_path / "source").write_bytes(b"other")
    store.upload(tmp_path / "source", url, "test")
    assert cache.fetch(url, stamp=store.stat(url, "test").stamp).read_bytes() == b"other" and before.read_bytes() == content


def test_the_least_recently_used_copies_are_removed(files, cache):
    for index, (url, digest, _) in enumerate(files[:3]):
        os.utime(cache.fetch(url, digest, SIZE), (index, index))
    cache.fetch(*files[0][:2], SIZE)  # marks it as used
    mapped = np.memmap(cache.fetch(*files[1][:2], SIZE), mode="r")
    os.utime(cache.fetch(*files[1][:2], SIZE), (1, 1))
    cache.fetch(*files[3][:2], SIZE)
    assert {cached.path.name.partition("-")[2] for cached in cache.files()} == {"file-0.tar", "file-2.tar", "file-3.tar"}
    assert mapped.tobytes() == files[1][2]  # still readable


@pytest.mark.parametrize("kind", FAULTS)
def test_transient_faults_are_survived(files, cache, proxy, kind):
    url, digest, content = files[0]
    proxy.faults.extend([Fault(kind)] * 2)
    assert cache.fetch(url, digest, SIZE).read_bytes() == content and proxy.injected[kind] == 2
    assert temporary_files(cache) == []


def test_wrong_contents_give_one_line(files, cache):
    url, digest, _ = files[0]
    expected = rf"^shards: expected {url} with sha256 {'0' * 64}, found {digest}, 3 times$"
    with pytest.raises(UserError, match=expected):
        cache.fetch(url, "0" * 64, SIZE)
    with pytest.raises(UserError, match=rf"^shards: expected to read {url}, found after 2 attempts: {SIZE} bytes of 7$"):
        FileCache(cache.folder, SIZE, store.Retries(attempts=2, first=0.01)).fetch(url, digest, 7)
    assert cache.files() == [] == temporary_files(cache)


def test_missing_files_and_a_limit_that_is_too_small_give_one_line(files, cache, bucket):
    with pytest.raises(UserError, match=rf"^shards: expected a file at {bucket}/none.tar, found none$"):
        cache.fetch(f"{bucket}/none.tar")
    with pytest.raises(UserError, match=r"^images.cache: expected a cache for s3://.*, 100000 bytes, found a limit of 99999$"):
        FileCache(cache.folder, SIZE - 1, key="images.cache").fetch(files[0][0])


@pytest.mark.parametrize("folder", ["a-file", "a-file/below"])
def test_an_unwritable_folder_gives_one_line(files, tmp_path, folder):
    (tmp_path / "a-file").write_text("x")
    with pytest.raises(UserError, match=r"^shards: expected room for s3://.* in the cache .*a-file.*, found .+"):
        FileCache(tmp_path / folder, SIZE).fetch(files[0][0])


def full_after(monkeypatch, cache, most):
    """Make downloads fail as if the disk of the cache held ``most`` bytes."""
    real = store.download

    def download(url, path, *others):
        if sum(cached.size for cached in cache.files()) + SIZE > most:
            path.write_bytes(b"incomplete")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(url, path, *others)

    monkeypatch.setattr(store, "download", download)


def test_many_files_are_listed_rarely(files, tmp_path, monkeypatch):
    """Listing a hundred thousand files takes seconds, so it is not done for each file. Making room then leaves some spare."""
    monkeypatch.setattr("ldm_smd.data.cache.MANY", 2)
    listings, real = [], FileCache._all
    monkeypatch.setattr(FileCache, "_all", lambda self: listings.append(1) or real(self))
    large, full = FileCache(tmp_path / "large", 10 * SIZE), FileCache(tmp_path / "full", 4 * SIZE)
    for url, digest, _ in files:
        large.fetch(url, digest, SIZE)
    assert len(large.files()) == 5 and len(listings) <= 7 + 1  # 7 until there are more than two; twice for each file otherwise
    for url, digest, _ in files:
        full.fetch(url, digest, SIZE)
    assert len(full.files()) == 3 and json.loads((tmp_path / "full/locks/room.json").read_text())["bytes"] == 3 * SIZE
    (tmp_path / "full/locks/room.json").write_text("damaged")
    full.make_room(2 * SIZE)
    assert len(full.files()) < 3


def test_a_full_disk_removes_other_copies(files, cache, monkeypatch):
    full_after(monkeypatch, cache, 2 * SIZE)
    for url, digest, content in files:
        assert cache.fetch(url, digest, SIZE).read_bytes() == content
    assert [cached.path.name.partition("-")[2] for cached in cache.files()] == ["file-3.tar", "file-4.tar"]


def test_a_full_disk_gives_one_line(files, cache, monkeypatch):
    full_after(monkeypatch, cache, 0)
    with pytest.raises(
        UserError, match=r"^shards: expected room for s3://.*file-0.tar in the cache .*cache, found a full disk$"
    ):
        cache.fetch(*files[0][:2], SIZE)
    assert cache.files() == [] == temporary_files(cache)


def test_files_of_killed_processes_are_removed(files, cache):
    cache.fetch(*files[0][:2], SIZE)
    for name, age in ((".old.tmp", 7200), (".new.tmp", 0)):
        (cache.folder / name).write_bytes(b"x")
        os.utime(cache.folder / name, (time.time() - age,) * 2)
    cache.fetch(*files[1][:2], SIZE)
    assert temporary_files(cache) == [".new.tmp"]


def test_a_copy_removed_before_it_is_opened_is_fetched_again(files, cache):
    url, digest, content = files[0]
    calls = []

    def read(path):
        calls.append(path)
        if len(calls) < 3:
            path.unlink()
        return path.read_bytes()

    assert cache.use(url, read, digest, SIZE) == content and len(calls) == 3
    with pytest.raises(UserError, match=r"^shards: expected a cache for all files read at once, found "):
        cache.use(url, lambda path: path.unlink() or path.read_bytes(), digest, SIZE)


def read_all(folder, files, rounds, seed, results):
    """Read random files through the cache, and put the number of correct ones into the queue ``results``."""
    cache = FileCache(folder, 2 * SIZE + SIZE // 2)
    correct = 0
    for index in np.random.default_rng(seed).integers(len(files), size=rounds):
        url, digest, content = files[index]
        correct += cache.use(url, lambda path: path.read_bytes(), digest, SIZE) == content
    results.put(correct)


def test_two_processes_share_a_cache_that_is_too_small(files, cache, proxy):
    """Each removes copies that the other is about to open, and the proxy injects faults."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    proxy.faults.extend(Fault(kind) for kind in FAULTS for _ in range(2))
    processes = [context.Process(target=read_all, args=(cache.folder, files, 40, seed, results)) for seed in (1, 2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [40, 40]
    for process in processes:
        process.join(timeout=10)
    assert not proxy.faults and temporary_files(cache) == []
    assert sum(cached.size for cached in cache.files()) <= 2 * SIZE + SIZE // 2


def test_concurrent_requests_for_a_file_fetch_it_once(files, cache, proxy):
    url, digest, _ = files[0]
    before = proxy.requests["GET"]
    threads = [threading.Thread(target=FileCache(cache.folder, SIZE).fetch, args=(url, digest, SIZE)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert proxy.requests["GET"] == before + 1


def test_downloads_at_the_same_time_end_within_the_limit(files, cache, monkeypatch):
    all_made_room, download = threading.Barrier(len(files)), store.download

    def download_together(url, path, key, size, retries, on_size):
        on_size(size)
        all_made_room.wait(60)
        download(url, path, key, size, retries)

    monkeypatch.setattr(store, "download", download_together)
    with ThreadPoolExecutor(len(files)) as threads:
        list(threads.map(lambda file: cache.fetch(file[0], file[1], SIZE), files))
    assert sum(cached.size for cached in cache.files()) == 3 * SIZE and temporary_files(cache) == []


def test_names_of_copies_contain_no_secrets(cache):
    names = [cache.name(url, None, 1, "") for url in ("https://me:pw@host/x.tar?sig=1", "https://me:pw@host/x.tar?sig=2")]
    assert len(set(names)) == 2 and all(name.endswith("-x.tar") for name in names) and "sig" not in json.dumps(names)
