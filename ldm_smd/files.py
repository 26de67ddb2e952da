"""Atomic writing of files and folders, and locks on outputs."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from filelock import FileLock, Timeout

from .errors import UserError


class HasOutput(Protocol):
    """Settings with an output folder."""

    output: str


Config = TypeVar("Config", bound=HasOutput)
Result = TypeVar("Result")

logger = logging.getLogger(__name__)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems without locks."""


@contextmanager
def atomic_file(final: Path, writer: str = "") -> Iterator[Path]:
    """Give a temporary path next to ``final`` to write to. It is fsynced and renamed if the context ends without an exception.

    ``writer`` distinguishes processes that may write the same file at the same time.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{writer}tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    temporary.unlink()
    try:
        yield temporary
        _allow_readers(temporary, mode)
        _fsync(temporary)
        temporary.rename(final)
        _fsync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def this_process() -> str:
    """Return a value for ``writer`` that is unique over processes and machines."""
    return f"{socket.gethostname()}-{os.getpid()}-"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def claimed(output: Path, key: str = "output", worker: str = "", inside: bool = False) -> Iterator[None]:
    """Check that ``output``, a folder or file, is writable, and lock it against other runs until the context ends.

    The lock is on a hidden file next to ``output``, or inside it. The kernel (or the NFS server) releases it when the process
    ends, even if it is killed; a leftover lock file is harmless. If nothing was written, nothing is left.

    Args:
        key: the setting that names ``output``, for messages.
        worker: workers with different names may share ``output``.
        inside: ``output`` is a folder that is written to directly, instead of renamed to its place when complete.

    Raises:
        UserError: ``output`` is not writable, or another run has locked it.
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
        except (OSError, ValueError) as error:  # ValueError: invalid characters in the path
            found = f"{str(output)!r}: {getattr(error, 'strerror', None) or error}"
            raise UserError(f"{key}: expected a writable path, found {found}") from error
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)  # before the release, so that others find no file or a new one
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
        if not path.exists():  # filelock retries if it cannot create the file, and ends here
            raise OSError(errno.EROFS, "cannot create files there") from None
        holder = path.read_text(encoding="utf-8", errors="replace") or "another"
        raise UserError(f"{key}: expected no other run at {output}, found {holder}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks, so other runs are not detected: %s", output, error.strerror)
        return
    path.write_text(f"process {os.getpid()} of {socket.gethostname()}", encoding="utf-8")


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on the file ``path`` against other processes, and tell whether it is held: without ``wait``, False where
    another process has it. It ends with its process. Where a file system has no locks, all processes hold it."""
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # before the release: others find no file, or a new one
        lock.release()


def claimed_by_first(output: Path, inside: bool = False) -> AbstractContextManager[None]:
    """Like ``claimed`` in the first process of a launcher; does nothing in the others."""
    return nullcontext() if int(os.environ.get("RANK", 0)) > 0 else claimed(output, inside=inside)


def makes_folder(distributed: bool = False) -> Callable[[Callable[[Config], Result]], Callable[[Config], Result]]:
    """Decorate a tool that makes the folder ``config.output``. It must be new or empty, and is locked during the run.

    Args:
        distributed: whether several processes of a launcher share the work. Otherwise they are refused, as each would do all
            of it.
    """

    def decorated(tool: Callable[[Config], Result]) -> Callable[[Config], Result]:
        @functools.wraps(tool)
        def run(config: Config) -> Result:
            processes = int(os.environ.get("WORLD_SIZE", 1))
            if processes > 1 and not distributed:
                raise UserError(f"WORLD_SIZE: expected one process, found {processes}; start this tool without a launcher")
            output = Path(config.output)
            with claimed_by_first(output):
                require_unused(output)
                return tool(config)

        return run

    return decorated


def require_folder(output: Path, key: str = "output") -> None:
    """Raise UserError if ``output`` is a file."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{key}: expected a folder or a new path, found a file at {output}")


def require_unused(output: Path) -> None:
    """Raise UserError if ``output`` exists and is not an empty folder."""
    require_folder(output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output: expected a new or empty folder, found files in {output}")


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Give a temporary folder next to ``final``. It is fsynced and renamed if the context ends without an exception.

    An existing ``final`` is replaced; between the two renames, the old one is called ``.NAME.old``.
    """
    temporary, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        mode = temporary.stat().st_mode
        for path in filter(Path.is_file, temporary.rglob("*")):
            _allow_readers(path, mode)
            _fsync(path)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _fsync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _allow_readers(path: Path, mode: int) -> None:
    """Let those read and write ``path`` whom ``mode``, of a new file or folder, allows to read and write.

    Only their owner can read the files that safetensors writes (https://github.com/safetensors/safetensors/issues/782).
    """
    found = stat.S_IMODE(path.stat().st_mode)
    wanted = found | stat.S_IMODE(mode) & 0o666
    if found != wanted:
        with suppress(PermissionError):  # a file system without permissions
            path.chmod(wanted)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict:
    """Read a JSON mapping; empty if there is no readable one."""
    try:
        return read_existing_json(path)
    except FileNotFoundError:
        return {}


def read_existing_json(path: Path) -> dict:
    """Read a JSON mapping; empty if it is not readable. Raises FileNotFoundError if there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
