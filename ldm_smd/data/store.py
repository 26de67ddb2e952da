"""Files in object stores and at URLs, through fsspec: s3://, gs://, https://, hf:// and its other protocols.

Credentials come from the environment and from files that the library of the store reads, never from a setting. URLs are printed
without user, password and signature. Failed requests are repeated after increasing pauses.
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
"""Extra of ldm_smd that installs the package for each scheme."""
STAMPS = (
    "ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "Digest", "Last-Modified",
    "LastModified", "updated", "mtime", "created",
)  # fmt: skip
"""Fields of a file's information that change with its contents, in order of preference."""
TRANSIENT_STATUS = {408, 425, 429}
TRANSIENT_ERRNOS = {
    errno.EIO, errno.EBUSY, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EAGAIN, None,
}  # fmt: skip
TRANSIENT_ERRORS = {
    "HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "FlexibleChecksumError",  # botocore
    "ClientConnectionError", "ClientPayloadError",  # aiohttp
    "TransportError", "ConnectionError", "Timeout",  # httpx, requests
    "ChecksumError",  # gcsfs
    "TimeoutError", "IncompleteRead",
}  # fmt: skip
"""Names of exceptions after which a request is repeated. They are names because their libraries may not be installed."""
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60
"""In seconds. The second is the longest time without a byte."""


@dataclass(frozen=True)
class Retries:
    """The number of attempts for a request, and the pauses between them.

    The first pause is ``first`` seconds long, and each further one is twice as long, up to ``longest``. Each is shortened by a
    random fraction of up to one half, so that many processes do not return at the same time.
    """

    attempts: int = 9
    first: float = 0.5
    longest: float = 30.0

    def pause(self, failures: int) -> None:
        """Wait after this number of failures."""
        time.sleep(min(self.longest, self.first * 2 ** (failures - 1)) * random.uniform(0.5, 1.0))


RETRIES = Retries()
"""Default. It survives an outage of a minute."""


@dataclass(frozen=True)
class Stat:
    """A file in a store.

    Attributes:
        url: URL of the file.
        size: size in bytes; None if the server does not report it.
        stamp: changes with the contents: an ETag, hash or time, as the store reports it; "" if it reports none.
    """

    url: str
    size: int | None
    stamp: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def is_remote(path: str | Path) -> bool:
    """Tell whether ``path`` is a URL with a scheme that fsspec supports."""
    found = SCHEME.match(str(path))
    return found is not None and found[1] in known_implementations and found[1] not in NOT_STORES


def without_credentials(text: str) -> str:
    """Remove users, passwords and query strings, which may be signatures, from a URL or from all URLs in a text."""
    text = re.sub(r"(\w://)[^/\s'\"@]*@", r"\1", text)
    return re.sub(r"(\w://[^\s'\"?]*)\?[^\s'\")]*", r"\1", text)


def require_no_credentials(url: str, key: str) -> None:
    """Raise UserError if a URL has a user, password or query string, because settings are written to files."""
    if without_credentials(url) != url:
        raise UserError(
            f"{key}: expected a URL without user, password or query string (credentials come from the environment, as the "
            f"store's own tools take them), found one at {without_credentials(url)}"
        )


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def store_of(url: str, key: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it. Call it in each process, because processes cannot share connections.

    Raises UserError, naming the extra of ldm_smd to install, if the store's library is missing.
    """
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if scheme in ("s3", "s3a"):
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "read_timeout": READ_TIMEOUT}
        elif scheme in ("gs", "gcs"):
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for each attempt
        elif scheme in ("http", "https"):
            options["client_kwargs"] = {"timeout": time_limits(key)}
        return fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(package_missing(scheme, key, error)) from error
    except ValueError as error:
        raise UserError(
            f"{key}: expected a URL, found {without_credentials(url)}: {without_credentials(one_line(error))}"
        ) from error


def time_limits(key: str) -> Any:
    """Return timeouts of aiohttp without a limit on the total time, because large files take long."""
    try:
        import aiohttp
    except ImportError as error:
        raise UserError(package_missing("https", key, error)) from error
    return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)


def package_missing(scheme: str, key: str, error: ImportError) -> str:
    extra = EXTRAS.get(scheme)
    needed = f"pip install 'ldm_smd[{extra}]'" if extra else one_line(error)
    return f"{key}: expected the package that reads {scheme}:// ({needed}), found it missing"


def is_transient(error: BaseException) -> bool:
    """Tell whether the same request may succeed later: after lost connections, truncated bodies, timeouts and server errors."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)):
        return False
    if str(error).startswith("Forbidden"):  # an OSError of gcsfs
        return False
    if any(cls.__name__ in TRANSIENT_ERRORS for cls in type(error).__mro__):
        return True
    status = status_of(error) or status_of(error.__cause__)
    if status is not None:
        return status >= 500 or status in TRANSIENT_STATUS
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of an exception from a store's library; None if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def with_retries(call: Callable[[], Result], url: str, key: str, expected: str, retries: Retries | None = None) -> Result:
    """Return the result of ``call``, which is repeated after transient errors.

    Raises:
        UserError: "key: expected ``expected``, found ...", after the last attempt or a permanent error.
        FileNotFoundError: the file or bucket does not exist.
        OSError: an error of the local disk.
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
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            reason = without_credentials(one_line(cause)) or type(error).__name__
            if not is_transient(error):
                raise UserError(f"{key}: expected {expected}, found: {reason}") from error
            if failures == retries.attempts:
                raise UserError(f"{key}: expected {expected}, found after {failures} attempts: {reason}") from error
            logger.info("%s: attempt %d failed: %s", without_credentials(url), failures, reason)
            retries.pause(failures)
    raise AssertionError("at least one attempt")


def without_stale_listings(store: AbstractFileSystem, call: Callable[[], Result]) -> Result:
    """Return the result of ``call``. If it fails and the file system has cached listings, clear them and call again.

    hf:// caches listings in each thread, in spite of ``use_listings_cache``, and files may have been written or replaced since.
    """
    try:
        return call()
    except Exception:
        if not store.dircache:
            raise
        store.invalidate_cache()
        return call()


def read_bytes(url: str, key: str, retries: Retries | None = None) -> bytes:
    """Return the contents of a small file. Raises FileNotFoundError if it does not exist, UserError if it cannot be read."""

    def read() -> bytes:
        store, path = store_of(url, key)
        return without_stale_listings(store, lambda: store.cat_file(path))

    return with_retries(read, url, key, f"to read {without_credentials(url)}", retries)


def read_json(url: str, key: str, retries: Retries | None = None) -> dict:
    """Read a JSON mapping. Returns an empty one if the file is missing or contains something else."""
    try:
        content = json.loads(read_bytes(url, key, retries))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def stat(url: str, key: str, retries: Retries | None = None) -> Stat | None:
    """Return size and stamp of a file; None if it does not exist."""

    def info() -> dict:
        store, path = store_of(url, key)
        return without_stale_listings(store, lambda: store.info(path))

    try:
        found = with_retries(info, url, key, f"to find {without_credentials(url)}", retries)
    except FileNotFoundError:
        return None
    return stat_of(url, found)


def stat_of(url: str, info: dict) -> Stat:
    stamp = next((str(info[name]) for name in STAMPS if info.get(name)), "")
    return Stat(url, info.get("size"), stamp)


def list_files(folder: str, key: str, pattern: str = "*", retries: Retries | None = None) -> list[Stat]:
    """List the files directly in a folder whose names match ``pattern``, sorted. Returns [] if there is no such folder.

    Makes one request for each thousand files in the folder. A web server must have an index page.
    """

    def entries() -> list[dict]:
        store, path = store_of(folder, key)
        store.invalidate_cache()
        return store.ls(path.rstrip("/") + ("/" if folder.startswith("http") else ""), detail=True)

    try:
        found = with_retries(entries, folder, key, f"to list {without_credentials(folder)}", retries)
    except FileNotFoundError:
        return []
    files = {str(entry["name"]).rpartition("/")[2]: entry for entry in found if entry["type"] == "file"}
    return [
        stat_of(join(folder, name), entry)
        for name, entry in sorted(files.items())
        if name and fnmatch.fnmatchcase(name, pattern)
    ]


class SizeCallback(NoOpCallback):
    """Calls ``on_size`` with the size of a file before its bytes arrive, if the server reports it."""

    def __init__(self, on_size: Callable[[int], None]) -> None:
        super().__init__()
        self.on_size = on_size

    def set_size(self, size: int | None) -> None:
        if size is not None:
            self.on_size(size)


def download(
    url: str,
    path: Path,
    key: str,
    size: int | None = None,
    retries: Retries | None = None,
    on_size: Callable[[int], None] = lambda size: None,
) -> None:
    """Copy a file to ``path``, which is complete only when this returns.

    Args:
        on_size: called with the size before the bytes arrive, if the server reports it. The response to the download has the
            size, so no other request is needed. Its exceptions end the download.

    Raises:
        UserError: the file cannot be read, or has another size.
        FileNotFoundError: it does not exist.
        OSError: the disk is full.
    """

    def get() -> None:
        store, source = store_of(url, key)
        without_stale_listings(store, lambda: store.get_file(source, str(path), callback=SizeCallback(on_size)))
        found = path.stat().st_size
        if size is not None and found != size:
            raise ConnectionError(f"{found} bytes of {size}")

    with_retries(get, url, key, f"to read {without_credentials(url)}", retries)


def upload(path: Path, url: str, key: str, retries: Retries | None = None) -> None:
    """Copy a file to ``url``. After an error, the object there is missing or the previous one, because a store names an object
    only once it is complete."""
    size = path.stat().st_size

    def put() -> None:
        store, target = store_of(url, key)
        store.put_file(str(path), target)
        found = store.info(target)["size"]
        if found != size:
            raise ConnectionError(f"{found} bytes of {size} stored")

    try:
        with_retries(put, url, key, f"to write {without_credentials(url)}", retries)
    except FileNotFoundError as error:
        reason = without_credentials(one_line(error))
        raise UserError(f"{key}: expected a writable URL, found {without_credentials(url)}: {reason}") from error
