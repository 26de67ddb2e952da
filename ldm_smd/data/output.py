"""Where tools/encode.py writes: a folder, or a place in an object store. A file there is whole or absent."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from ..errors import UserError
from ..files import atomic_file, claimed, sha256
from . import store
from .shards import read_json

UPLOADS_AHEAD = 4
"""Files that wait in the temporary folder to be uploaded, while the next shard is made: two shards and their records."""


class Output(Protocol):
    """A place for files by name."""

    def claimed(self, worker: str) -> AbstractContextManager[None]:
        """Give the right to write; another worker of that name has it not, where locks can tell."""

    def sizes(self) -> dict[str, int]:
        """Return the files that are there, and their sizes in bytes; hidden ones are left out."""

    def read(self, name: str) -> dict:
        """Return the JSON mapping in a file; empty where there is none."""

    def write(self, name: str) -> AbstractContextManager[Path]:
        """Give a local path to write to; the file has its name when all written before has."""

    def holds(self, record: dict, size: int) -> bool:
        """Tell whether the shard, of so many bytes, is as its record says."""

    def flush(self) -> None:
        """Wait until all that was written is there."""


def output_at(place: str, worker: str) -> Output:
    """Return the place of that path or URL; ``worker`` tells those apart who write to it at once."""
    if not store.is_remote(place):
        return Folder(Path(place), worker)
    store.require_no_credentials(place, "output")
    if place.startswith("http"):
        raise UserError(f"output: expected a folder, or a store that can be written (s3://, gs://, hf://), found {place}")
    return InStore(place.rstrip("/"))


class Folder:
    """A local folder. Shards are compared with the hash in their record."""

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

    def holds(self, record: dict, size: int) -> bool:
        path = self.path / record["shard"]["name"]
        return path.is_file() and sha256(path) == record["shard"]["sha256"]

    def flush(self) -> None:
        pass


class InStore:
    """A place in an object store, without locks: two workers of one name do the same work, and write the same bytes.

    Files are made in a temporary folder and uploaded, one after the other, by a thread, so that the next is made meanwhile.
    After an error nothing more is uploaded: no record without its shard. Shards are compared with the size in their record,
    which was written after them, by whoever knew their hash.
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
        return {each.name: each.size or 0 for each in store.listed(self.url, "output") if not each.name.startswith(".")}

    def read(self, name: str) -> dict:
        return store.read_json(store.joined(self.url, name), "output")

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
            store.upload(temporary, store.joined(self.url, name), "output")
        except Exception as error:
            self._failed = error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def holds(self, record: dict, size: int) -> bool:
        return record.get("bytes") == size

    def flush(self) -> None:
        while self._uploads:
            self._uploads.pop(0).result()
