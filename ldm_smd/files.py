"""Files and folders that are either complete under their final name, or absent; and locks on outputs."""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from filelock import FileLock, Timeout

from .errors import UserError


class HasOutput(Protocol):
    """Settings of a tool that makes a folder."""

    output: str


Config = TypeVar("Config", bound=HasOutput)
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@contextmanager
def atomic_file(final: Path, writer: str = "") -> Iterator[Path]:
    """Give a temporary path beside ``final`` to write to, fsynced and renamed when the block ends without an exception.

    ``writer`` distinguishes processes that may write the same file at once.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{writer}tmp")
    try:
        yield temporary
        _fsync(temporary)
        temporary.rename(final)
        _fsync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def this_process() -> str:
    """Return a name for ``writer`` that no other process has, on any machine."""
    return f"{socket.gethostname()}-{os.getpid()}-"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def claimed(output: Path, key: str = "output", worker: str = "", inside: bool = False) -> Iterator[None]:
    """Check that ``output``, a folder or file, can be written, and lock it against other runs until the block ends.

    The lock is on a hidden file beside ``output``, or inside. The kernel, or over NFS the server, releases it when its
    process ends, however it ends; the file that a killed run leaves does no harm. If nothing was written, nothing is left.

    Args:
        key: the setting that names ``output``, for messages.
        worker: workers of different names may share ``output``.
        inside: ``output`` is a folder that is written into, and not one that is renamed to its place when it is complete.

    Raises:
        UserError: ``output`` cannot be written, or another run holds it.
    """
    output = Path(os.path.abspath(output))
    parent = output if inside else output.parent
    lock = FileLock(parent / (f".{worker}lock" if inside else f".{output.name}.{worker}lock"), timeout=0)
    missing: list[Path] = []
    try:
        try:
            if inside:
                require_folder(output, key)
            missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            _lock(lock, output, key)
        except (OSError, ValueError) as error:  # ValueError: characters that no path can have
            found = f"{str(output)!r}: {getattr(error, 'strerror', None) or error}"
            raise UserError(f"{key}: expected a place that can be written, found {found}") from error
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)  # before the release: others find no file, or a new one
            lock.release()
        for folder in missing:
            with suppress(OSError, ValueError):  # not empty
                folder.rmdir()


def _lock(lock: FileLock, output: Path, key: str) -> None:
    if output.exists() and not os.access(output, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    path = Path(lock.lock_file)
    try:
        lock.acquire()
    except Timeout:
        if not path.exists():  # filelock retries where it cannot make the file, and ends here
            raise OSError(errno.EROFS, "no files can be made there") from None
        holder = path.read_text(encoding="utf-8", errors="replace") or "another"
        raise UserError(f"{key}: expected no other run at {output}, found {holder}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning("%s: no locks on this file system, other runs there go unnoticed: %s", output, error.strerror)
        return
    path.write_text(f"process {os.getpid()} of {socket.gethostname()}", encoding="utf-8")


def claimed_by_first(output: Path, inside: bool = False) -> AbstractContextManager[None]:
    """Apply ``claimed`` in the first process of a launcher, and nothing in the others."""
    return nullcontext() if int(os.environ.get("RANK", 0)) > 0 else claimed(output, inside=inside)


def makes_folder(tool: Callable[[Config], Result]) -> Callable[[Config], Result]:
    """Decorate a tool that makes the folder ``config.output``: it must be new or empty, and is claimed during the run."""

    @functools.wraps(tool)
    def run(config: Config) -> Result:
        output = Path(config.output)
        with claimed_by_first(output):
            require_unused(output)
            return tool(config)

    return run


def require_folder(output: Path, key: str = "output") -> None:
    """Raise UserError if a tool's output folder exists as a file."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{key}: expected a folder, or nothing yet, found a file at {output}")


def require_unused(output: Path) -> None:
    """Raise UserError if a tool's output folder contains files already."""
    require_folder(output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output: expected a new or empty folder, found files in {output}")


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``final``, fsynced and renamed to it when the block ends without an exception.

    An existing ``final`` is replaced; between the two renames the old one is ``.NAME.old``.
    """
    temporary, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in filter(Path.is_file, temporary.rglob("*")):
            _fsync(path)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _fsync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
