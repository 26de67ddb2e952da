"""Outputs of tools/encode.py: a folder, or a URL in an object store. Files appear under their names only when complete."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from ..errors import UserError
from ..files import atomic_file, claimed, read_json, sha256
from . import store

UPLOADS_AHEAD = 4
"""Files that may wait for their upload while the next shard is made: two shards and their records."""


class Output(Protocol):
    """A flat folder of files."""

    def claimed(self, worker: str) -> AbstractContextManager[None]:
        """Hold the right to write. Another worker of the same name is refused, if the file system has locks."""

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file, without hidden files."""

    def read(self, name: str) -> dict:
        """Return the JSON mapping in a file; empty if there is none."""

    def write(self, name: str) -> AbstractContextManager[Path]:
        """Yield a local path to write to. The file appears under its name after all files written before."""

    def matches(self, record: dict, size: int) -> bool:
        """Tell whether a shard of ``size`` bytes matches its record."""

    def flush(self) -> None:
        """Wait until all written files have appeared."""


def output_at(location: str, worker: str) -> Output:
    """Return the output at a path or URL. ``worker`` must be unique among the processes that write there."""
    if not store.is_remote(location):
        return Folder(Path(location), worker)
    store.require_no_credentials(location, "output")
    if location.startswith("http"):
        raise UserError(f"output: expected a folder, or a writable store (s3://, gs://, hf://), found {location}")
    return StoreOutput(location.rstrip("/"))


class Folder:
    """A local folder. Shards are verified by the hash in their record."""

    def __init__(self, path: Path, worker: str) -> None:
        self.path, self.worker = path, worker

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def claimed(self, worker: str) -> Iterator[None]:
        with claimed(self.path, worker=worker, inside=True):
            yield

    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.path.glob("[!.]*")}

    def read(self, name: str) -> dict:
        return read_json(self.path / name)

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        with atomic_file(self.path / name, self.worker) as temporary:
            yield temporary

    def matches(self, record: dict, size: int) -> bool:
        path = self.path / record["shard"]["name"]
        return path.is_file() and sha256(path) == record["shard"]["sha256"]

    def flush(self) -> None:
        pass


class StoreOutput:
    """A URL in an object store. There are no locks: two workers of the same name do the same work and write the same bytes.

    Files are written to a temporary folder, and a thread uploads them one after the other while the next is written. After an
    error nothing more is uploaded, so there is no record without its shard. Shards are verified by the size in their record,
    which is uploaded after the shard.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._uploads: list[Future[None]] = []
        self._failed: Exception | None = None

    def __str__(self) -> str:
        return self.url

    @contextmanager
    def claimed(self, worker: str) -> Iterator[None]:
        with tempfile.TemporaryDirectory(prefix="ldm_smd-") as folder, ThreadPoolExecutor(1) as self._thread:
            self._temporary = Path(folder)
            try:
                yield
                self.flush()
            finally:
                self._thread.shutdown(cancel_futures=True)

    def sizes(self) -> dict[str, int]:
        return {each.name: each.size or 0 for each in store.list_files(self.url, "output") if not each.name.startswith(".")}

    def read(self, name: str) -> dict:
        return store.read_json(store.join(self.url, name), "output")

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        temporary = self._temporary / name
        try:
            yield temporary
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._uploads.append(self._thread.submit(self._upload, temporary, name))
        while len(self._uploads) > UPLOADS_AHEAD:
            self._uploads.pop(0).result()

    def _upload(self, temporary: Path, name: str) -> None:
        try:
            if self._failed is not None:
                raise self._failed
            store.upload(temporary, store.join(self.url, name), "output")
        except Exception as error:
            self._failed = error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def matches(self, record: dict, size: int) -> bool:
        return record.get("bytes") == size

    def flush(self) -> None:
        while self._uploads:
            self._uploads.pop(0).result()
