"""Writing files and folders so that they are either whole under their final name, or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


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


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_unused(output: Path) -> None:
    """Raise UserError where a tool's output folder has files in it already."""
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
