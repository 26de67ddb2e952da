"""Writing files and folders so that they are either whole under their final name, or not there at all."""

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
    """The settings of a tool that makes a folder."""

    output: str


Config = TypeVar("Config", bound=HasOutput)
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@contextmanager
def atomic_file(final: Path, writer: str = "") -> Iterator[Path]:
    """A temporary path beside ``final`` to write to; fsynced and renamed when the block ends without an exception.

    ``writer`` tells apart processes that may write the same file at once.
    """
    final = Path(final)
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
    """A name that no other process has, on any machine, for ``writer``."""
    return f"{socket.gethostname()}-{os.getpid()}-"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def claimed(output: Path, key: str = "output", worker: str = "", inside: bool = False) -> Iterator[None]:
    """For the whole of a run: ``output``, a folder or file, can be written, and no other run writes it.

    The lock is on a hidden file beside ``output``, or inside. The kernel, or over NFS the server, gives it back when its
    process ends, however it ends; the file that a killed run leaves does no harm. Where nothing was written, nothing is left.

    Args:
        key: the setting that names ``output``, for messages.
        worker: workers of different names may share ``output``.
        inside: ``output`` is a folder that is written into, and not one that is put there when it is finished.

    Raises:
        UserError: ``output`` cannot be written, or another run holds it.
    """
    output = Path(os.path.abspath(output))
    place = output if inside else output.parent
    lock = FileLock(place / (f".{worker}lock" if inside else f".{output.name}.{worker}lock"), timeout=0)
    missing: list[Path] = []
    try:
        try:
            if inside:
                require_folder(output, key)
            missing = [folder for folder in (place, *place.parents) if not folder.exists()]
            place.mkdir(parents=True, exist_ok=True)
            _lock(lock, output, key)
        except (OSError, ValueError) as error:  # ValueError: of characters that no path has
            said = getattr(error, "strerror", None) or error
            raise UserError(f"{key}: expected a place that can be written, found {str(output)!r}: {said}") from error
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)  # before it is released: who opens it later finds none, or another
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
        if not path.exists():  # filelock tries again where a file cannot be made, and gives up here
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
    """``claimed``, by the first of the processes of a launcher; the others run without."""
    return nullcontext() if int(os.environ.get("RANK", 0)) > 0 else claimed(output, inside=inside)


def makes_folder(tool: Callable[[Config], Result]) -> Callable[[Config], Result]:
    """Decorate a tool that makes the folder ``config.output``: it must be new or empty, and is claimed while the tool runs."""

    @functools.wraps(tool)
    def run(config: Config) -> Result:
        output = Path(config.output)
        with claimed_by_first(output):
            require_unused(output)
            return tool(config)

    return run


def require_folder(output: Path, key: str = "output") -> None:
    """Raise UserError where something that is no folder has the name of one that a tool writes."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{key}: expected a folder, or nothing yet, found a file at {output}")


def require_unused(output: Path) -> None:
    """Raise UserError where a tool's output folder has files in it already."""
    require_folder(output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output: expected a new or empty folder, found files in {output}")


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside ``final``; renamed to it, fsynced, when the block ends without an exception.

    An existing ``final`` is replaced; for the moment between the two renames the old one lies under ``.NAME.old``.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp")
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
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
