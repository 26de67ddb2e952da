"""FileCache: local copies of files in object stores, up to a total size, for any number of processes and nodes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..errors import UserError
from ..files import locked, read_json, this_process
from ..files import sha256 as sha256_of
from . import store

Result = TypeVar("Result")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
OPEN_ATTEMPTS, WRONG_ATTEMPTS = 20, 3
MANY, LISTED_SECONDS = 1000, 300
"""With more files than MANY, they are listed this often, or when the cache is full."""
ABANDONED_SECONDS = 3600
"""Age of a temporary file after which its process must have been killed."""


class Cached(NamedTuple):
    """A file in the cache. Its path is a string, because there may be many thousands."""

    used: float
    size: int
    name: str
    text_path: str

    @property
    def path(self) -> Path:
        return Path(self.text_path)

    @property
    def temporary(self) -> bool:
        return self.name.startswith(".")


class FileCache:
    """Local copies of remote files, verified after the download. Beyond the limit, the least recently used ones are removed.

    A file gets its name once it is complete and verified. Locks, which also work over NFS, prevent two processes from fetching
    the same file. On a file system without locks, both fetch it, and the second replaces the first by an equal copy.

    Args:
        folder: folder of the copies, created for the first file.
        limit_bytes: maximum size of all files, including those being downloaded. Processes that download at the same time may
            exceed it until one of them is done.
        retries: how often requests are repeated.
        key: the setting that names the files, for messages.
    """

    def __init__(self, folder: str | Path, limit_bytes: int, retries: store.Retries | None = None, key: str = "shards") -> None:
        self.folder, self.limit_bytes, self.key = Path(folder).expanduser(), limit_bytes, key
        self.retries = retries or store.RETRIES

    def fetch(self, url: str | Path, sha256: str | None = None, size: int | None = None, stamp: str = "") -> Path:
        """Return a local copy of ``url``; a local path is returned as it is.

        The copy may be removed before it is opened, to make room for others; ``use`` handles this. Once it is open or mapped,
        it stays readable.

        Args:
            sha256, size: expected hash and size. None: not checked.
            stamp: version of the file (``store.Stat``). A file with another stamp gets another copy.

        Raises:
            UserError: the file does not exist, cannot be read, or still differs from the expected one after repeated downloads;
                or the disk of the cache is full.
        """
        path = self._fetched(str(url), sha256, size, stamp, waits=True)
        assert path is not None
        return path

    def try_fetch(self, url: str, sha256: str | None = None, size: int | None = None, stamp: str = "") -> bool:
        """Fetch the file, but return False at once if another process or thread is fetching it."""
        return self._fetched(url, sha256, size, stamp, waits=False) is not None

    def discard(self, url: str, sha256: str | None = None, size: int | None = None, stamp: str = "") -> None:
        """Remove a damaged copy."""
        (self.folder / self.name(url, sha256, size, stamp)).unlink(missing_ok=True)

    def _fetched(self, url: str, sha256: str | None, size: int | None, stamp: str, waits: bool) -> Path | None:
        if not store.is_remote(url):
            return Path(url)
        path = self.folder / self.name(url, sha256, size, stamp)
        try:
            if self._exists(path, size):
                return path
            with self._locked(path.name, waits) as held:
                if not held:
                    return None
                if not self._exists(path, size):
                    self._fetch(url, path, sha256, size)
        except OSError as error:
            found = "a full disk" if error.errno in DISK_FULL else error.strerror or str(error)
            raise UserError(
                f"{self.key}: expected room for {store.without_credentials(url)} in the cache {self.folder}, found {found}"
            ) from error
        return path

    def use(
        self,
        url: str | Path,
        function: Callable[[Path], Result],
        sha256: str | None = None,
        size: int | None = None,
        stamp: str = "",
    ) -> Result:
        """Return ``function(path)`` for the path of a local copy. Fetches it again if it was removed before it was opened."""
        for attempt in range(OPEN_ATTEMPTS):
            path = self.fetch(url, sha256, size, stamp)
            try:
                return function(path)
            except FileNotFoundError:
                if not store.is_remote(url):
                    raise
                time.sleep(0.01 * attempt)
        raise UserError(
            f"{self.key}: expected a cache for all files read at once, found {self.limit_bytes} bytes in {self.folder}: "
            f"{store.without_credentials(str(url))} was removed {OPEN_ATTEMPTS} times before it was opened"
        )

    @staticmethod
    def name(url: str, sha256: str | None, size: int | None, stamp: str) -> str:
        """Return the name of a file's copy. It begins with the hash of the contents, if that is known."""
        identity = sha256 or hashlib.sha256(repr((url, size, stamp)).encode()).hexdigest()
        readable = re.sub(r"[^\w.-]+", "_", store.without_credentials(url).rpartition("/")[2])[-64:]
        return f"{identity[:40]}-{readable}"

    def files(self) -> list[Cached]:
        """List the copies, the least recently used first."""
        return sorted(cached for cached in self._all() if not cached.temporary)

    def make_room(self, size: int, since: float | None = None) -> None:
        """Remove files of killed processes, and the least recently used copies until ``size`` more bytes fit.

        With many files, a tenth of the limit is made free at once, and until it is used, only the total is updated.

        Args:
            since: time at which room was made for these bytes before. By now they are the size of a copy.
        """
        record = self.folder / "locks" / "room.json"
        with self._locked("room"):
            now, known = time.time(), read_json(record)
            # A listing may have found a part of a download only.
            more = size if since is None or known.get("listed", 0.0) > since else 0
            fits = known.get("bytes", self.limit_bytes) + more <= self.limit_bytes
            if known.get("files", 0) > MANY and now - known["listed"] < LISTED_SECONDS and fits:
                known["bytes"] += more
            else:
                found = list(self._all())
                abandoned = [each for each in found if each.temporary and now - each.used > ABANDONED_SECONDS]
                for cached in abandoned:
                    cached.path.unlink(missing_ok=True)
                total = sum(cached.size for cached in found) - sum(cached.size for cached in abandoned)
                total += size if since is None else 0
                if total > self.limit_bytes:
                    spare = self.limit_bytes // 10 if len(found) > MANY else 0
                    total -= self._remove(total - self.limit_bytes + spare)
                known = {"bytes": total, "files": len(found), "listed": now}
            with suppress(OSError):  # a full disk, for instance. Without a record, the next call lists again.
                record.unlink(missing_ok=True)
                record.write_text(json.dumps(known), encoding="utf-8")

    def _remove(self, size: int) -> int:
        """Remove the least recently used copies, ``size`` bytes or more in total. Return the number of bytes removed."""
        removed = 0
        for cached in self.files():
            if removed >= size:
                break
            cached.path.unlink(missing_ok=True)
            removed += cached.size
        return removed

    def _all(self) -> Iterator[Cached]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        status = entry.stat()
                        yield Cached(status.st_mtime, status.st_size, entry.name, entry.path)

    def _exists(self, path: Path, size: int | None) -> bool:
        """Tell whether the copy exists, and mark it as used."""
        try:
            found = path.stat().st_size
            with suppress(PermissionError):  # the file belongs to another user of the folder
                os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return size is None or found == size

    def _fetch(self, url: str, path: Path, sha256: str | None, size: int | None) -> None:
        """Download a file, verify it and give it its name."""
        temporary = path.with_name(f".{path.name}.{this_process()}{os.urandom(4).hex()}.tmp")
        found = ""
        for failures in range(1, WRONG_ATTEMPTS + 1):
            try:
                reserved = self._download(url, temporary, size)
                found = sha256_of(temporary) if sha256 else ""
                if found == (sha256 or ""):
                    with open(temporary, "rb") as file:
                        os.fsync(file.fileno())
                    size_found = temporary.stat().st_size
                    temporary.rename(path)
                    self.make_room(size_found, reserved)  # others may have fetched files at the same time
                    return
            except FileNotFoundError as error:
                raise UserError(f"{self.key}: expected a file at {store.without_credentials(url)}, found none") from error
            finally:
                temporary.unlink(missing_ok=True)
            if failures < WRONG_ATTEMPTS:
                self.retries.pause(failures)
        raise UserError(
            f"{self.key}: expected {store.without_credentials(url)} with sha256 {sha256}, found {found}, {WRONG_ATTEMPTS} times"
        )

    def _download(self, url: str, temporary: Path, size: int | None) -> float:
        """Download a file. While the disk is full, remove other copies and try again.

        Returns the time at which room was made for it.
        """
        reserved = 0.0

        def on_size(found: int) -> None:
            if found > self.limit_bytes:
                raise UserError(
                    f"{self.key}: expected a cache for {store.without_credentials(url)}, {found} bytes, found a limit of "
                    f"{self.limit_bytes}"
                )
            self.make_room(found)
            nonlocal reserved
            reserved = time.time()

        while True:
            try:
                store.download(url, temporary, self.key, size, self.retries, on_size)
                return reserved
            except OSError as error:
                temporary.unlink(missing_ok=True)
                if error.errno not in DISK_FULL or not self._remove(size or 1):
                    raise

    def _locked(self, name: str, waits: bool = True) -> AbstractContextManager[bool]:
        """Hold the lock ``name``. If another process holds it, wait, or yield False if not ``waits``."""
        path = self.folder / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return locked(path, waits)
