"""Files in object stores and at URLs, through fsspec: s3://, gs://, https://, hf:// and whatever else it knows.

Credentials come from the environment and files that the store's own library reads, never from a setting: what is printed of a
URL has neither user, password nor signature. Connections that fail are tried again, after longer and longer pauses.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.callbacks import NoOpCallback
from fsspec.registry import known_implementations

from ..errors import UserError, one_line

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://")
NOT_STORES = {"file", "local", "pipe", "datasets"}
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""Optional dependencies of ldm_smd, by scheme."""
STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "Content-MD5",
    "Digest",
    "Last-Modified",
    "LastModified",
    "updated",
    "mtime",
    "created",
)
TOO_BUSY = {408, 425, 429}
PASSING_ERRNOS = {
    errno.EIO, errno.EBUSY, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EAGAIN, None,
}  # fmt: skip
PASSING_ERRORS = {
    "HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "FlexibleChecksumError",  # botocore
    "ClientConnectionError", "ClientPayloadError",  # aiohttp
    "TransportError", "ConnectionError", "Timeout",  # httpx, requests
    "ChecksumError",  # gcsfs
    "TimeoutError", "IncompleteRead",
}  # fmt: skip
"""Names of exceptions, of libraries that may not be there, after which a request is worth another try."""
SECONDS_TO_CONNECT, SECONDS_WITHOUT_A_BYTE = 10, 60


@dataclass(frozen=True)
class Retries:
    """How often a request is made, and the pauses between: ``first`` seconds, twice that, and so on up to ``longest``, each
    less a random part of up to a half, so that many processes do not come back at once."""

    attempts: int = 9
    first: float = 0.5
    longest: float = 30.0

    def pause(self, failures: int) -> None:
        """Wait after so many failures."""
        time.sleep(min(self.longest, self.first * 2 ** (failures - 1)) * random.uniform(0.5, 1.0))


RETRIES = Retries()
"""A store may be away for a minute."""


@dataclass(frozen=True)
class Stat:
    """A file in a store.

    Attributes:
        url: of the file.
        size: in bytes; None where the server does not say.
        stamp: changes with the contents: an ETag, hash or time, as the store has it; "" where it has none.
    """

    url: str
    size: int | None
    stamp: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def is_remote(path: str | Path) -> bool:
    """Tell whether ``path`` is a URL of a scheme that fsspec knows."""
    found = SCHEME.match(str(path))
    return found is not None and found[1] in known_implementations and found[1] not in NOT_STORES


def shown(text: str) -> str:
    """Return a URL, or a text with URLs in it, without users, passwords and query strings (which may be signatures)."""
    text = re.sub(r"(\w://)[^/\s'\"@]*@", r"\1", text)
    return re.sub(r"(\w://[^\s'\"?]*)\?[^\s'\")]*", r"\1", text)


def require_no_credentials(url: str, key: str) -> None:
    """Raise UserError if the URL of a folder has a user, password or query string: settings are written to files."""
    if shown(url) != url:
        raise UserError(
            f"{key}: expected a URL without user, password or query string (credentials come from the environment, as the "
            f"store's own tools take them), found one at {shown(url)}"
        )


def joined(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def store_of(url: str, key: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it. To be called again in another process: connections are of one.

    Raises UserError, naming the extra of ldm_smd to install, where the store's library is missing.
    """
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if scheme in ("s3", "s3a"):
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "read_timeout": SECONDS_WITHOUT_A_BYTE}
        elif scheme in ("gs", "gcs"):
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for each attempt
        elif scheme in ("http", "https"):
            options["client_kwargs"] = {"timeout": time_limits(key)}
        return fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(package_missing(scheme, key, error)) from error
    except ValueError as error:
        raise UserError(f"{key}: expected a URL, found {shown(url)}: {shown(one_line(error))}") from error


def time_limits(key: str) -> Any:
    """Return aiohttp's limits for large files, which have all the time they need while bytes come."""
    try:
        import aiohttp
    except ImportError as error:
        raise UserError(package_missing("https", key, error)) from error
    return aiohttp.ClientTimeout(total=None, sock_connect=SECONDS_TO_CONNECT, sock_read=SECONDS_WITHOUT_A_BYTE)


def package_missing(scheme: str, key: str, error: ImportError) -> str:
    extra = EXTRAS.get(scheme)
    needed = f"pip install 'ldm_smd[{extra}]'" if extra else one_line(error)
    return f"{key}: expected the package that reads {scheme}:// ({needed}), found it missing"


def passing(error: BaseException) -> bool:
    """Tell whether the same request may succeed later: after lost connections, cut bodies, timeouts, errors of the server."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)):
        return False
    if str(error).startswith("Forbidden"):  # an OSError of gcsfs
        return False
    if any(kind.__name__ in PASSING_ERRORS for kind in type(error).__mro__):
        return True
    status = status_of(error) or status_of(error.__cause__)
    if status is not None:
        return status >= 500 or status in TOO_BUSY
    return isinstance(error, OSError) and error.errno in PASSING_ERRNOS


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status that an exception of a store's library has; None where it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def tried(call: Callable[[], Result], url: str, key: str, expected: str, retries: Retries | None = None) -> Result:
    """Return what ``call`` returns, called again after errors that may pass.

    Raises:
        UserError: "key: expected ``expected``, found ...", after the last attempt, or an error that will not pass.
        FileNotFoundError: there is no such file, or bucket.
        OSError: of the local disk.
    """
    retries = retries or RETRIES
    for failures in range(1, retries.attempts + 1):
        try:
            return call()
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and (error.errno in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None):
                raise
            told = shown(one_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)) or type(error).__name__
            if not passing(error):
                raise UserError(f"{key}: expected {expected}, found: {told}") from error
            if failures == retries.attempts:
                raise UserError(f"{key}: expected {expected}, found after {failures} attempts: {told}") from error
            logger.info("%s: attempt %d failed: %s", shown(url), failures, told)
            retries.pause(failures)
    raise AssertionError("at least one attempt")


def fresh(store: AbstractFileSystem, call: Callable[[], Result]) -> Result:
    """Return what ``call`` returns; where it fails and the store remembers what it listed, forget that, and call again. hf://
    does, in spite of ``use_listings_cache``, and each thread for itself: others may have written or replaced files since."""
    try:
        return call()
    except Exception:
        if not store.dircache:
            raise
        store.invalidate_cache()
        return call()


def read_bytes(url: str, key: str, retries: Retries | None = None) -> bytes:
    """Return the contents of a small file; UserError where it cannot be read, FileNotFoundError where it is not there."""

    def read() -> bytes:
        store, path = store_of(url, key)
        return fresh(store, lambda: store.cat_file(path))

    return tried(read, url, key, f"to read {shown(url)}", retries)


def read_json(url: str, key: str, retries: Retries | None = None) -> dict:
    """Read a JSON mapping; empty where there is no file, or another one."""
    try:
        content = json.loads(read_bytes(url, key, retries))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def stat(url: str, key: str, retries: Retries | None = None) -> Stat | None:
    """Return size and stamp of a file; None where it is not there."""

    def info() -> dict:
        store, path = store_of(url, key)
        return fresh(store, lambda: store.info(path))

    try:
        found = tried(info, url, key, f"to find {shown(url)}", retries)
    except FileNotFoundError:
        return None
    return stat_of(url, found)


def stat_of(url: str, info: dict) -> Stat:
    stamp = next((str(info[name]) for name in STAMPS if info.get(name)), "")
    return Stat(url, info.get("size"), stamp)


def listed(folder: str, key: str, pattern: str = "*", retries: Retries | None = None) -> list[Stat]:
    """List the files directly in a folder whose names match ``pattern``, sorted; none where there is no such folder. One
    request for a thousand files, however many match. Over https:// a server must have an index page."""

    def entries() -> list[dict]:
        store, path = store_of(folder, key)
        store.invalidate_cache()
        return store.ls(path.rstrip("/") + ("/" if folder.startswith("http") else ""), detail=True)

    try:
        found = tried(entries, folder, key, f"to list {shown(folder)}", retries)
    except FileNotFoundError:
        return []
    files = {str(entry["name"]).rpartition("/")[2]: entry for entry in found if entry["type"] == "file"}
    return [
        stat_of(joined(folder, name), entry)
        for name, entry in sorted(files.items())
        if name and fnmatch.fnmatchcase(name, pattern)
    ]


class Beginning(NoOpCallback):
    """Calls ``begins`` with the size of a file, where the server says it, before the bytes come."""

    def __init__(self, begins: Callable[[int], None]) -> None:
        super().__init__()
        self.begins = begins

    def set_size(self, size: int | None) -> None:
        if size is not None:
            self.begins(size)


def download(
    url: str,
    path: Path,
    key: str,
    size: int | None = None,
    retries: Retries | None = None,
    begins: Callable[[int], None] = lambda size: None,
) -> None:
    """Copy a file to ``path``, which is not whole until this returns; UserError where it cannot be read or has another size,
    FileNotFoundError where it is not there, OSError where the disk is full.

    ``begins`` is called with the size before the bytes come, where the server says it: the answer does, and no request more is
    needed. What it raises ends the download.
    """

    def get() -> None:
        store, source = store_of(url, key)
        fresh(store, lambda: store.get_file(source, str(path), callback=Beginning(begins)))
        found = path.stat().st_size
        if size is not None and found != size:
            raise ConnectionError(f"{found} bytes of {size}")

    tried(get, url, key, f"to read {shown(url)}", retries)


def upload(path: Path, url: str, key: str, retries: Retries | None = None) -> None:
    """Copy a file to ``url``, where it is whole or, after an error, absent or as it was before: a store gives an object its
    name when all of it is there."""
    size = path.stat().st_size

    def put() -> None:
        store, target = store_of(url, key)
        store.put_file(str(path), target)
        found = store.info(target)["size"]
        if found != size:
            raise ConnectionError(f"{found} bytes there of {size}")

    try:
        tried(put, url, key, f"to write {shown(url)}", retries)
    except FileNotFoundError as error:
        found = shown(one_line(error))
        raise UserError(f"{key}: expected a place that can be written, found {shown(url)}: {found}") from error
