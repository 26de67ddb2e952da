"""The regular files in a tar, by its headers alone: several times as fast as ``tarfile`` lists them.

Names in ustar, GNU and pax form are read here; a tar with rarer things (sparse files) is left to ``tarfile``.
"""

from __future__ import annotations

import mmap
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
ZEROS = bytes(BLOCK)
REGULAR = frozenset((b"0", b"\0", b"7"))
WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
"""Links, devices, folders and pipes."""
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
SPACES = sum(b" " * 8)
"""What the checksum's own bytes count as."""
ADLER_PRIME = 65521


class Member(NamedTuple):
    """A regular file: ``size`` bytes from ``offset`` on."""

    name: str
    offset: int
    size: int


class _Unusual(Exception):
    """Something that ``tarfile`` must read."""


def tar_members(path: str | Path) -> list[Member]:
    """List the regular files of an uncompressed tar in order.

    Raises tarfile.TarError or OSError, also for a damaged header between two files, where ``tarfile`` ends without a word.
    """
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # a file of no bytes has no map
            raise tarfile.ReadError("empty file") from None
    with data:
        try:
            return _members(data)
        except _Unusual:
            pass
    with tarfile.open(path, "r:") as tar:
        return [Member(each.name, each.offset_data, each.size) for each in tar if each.isreg()]


def _members(data: mmap.mmap) -> list[Member]:
    found: list[Member] = []
    position, end = 0, len(data)
    given: dict[str, str] = {}  # name and size from extended headers, for the next member
    while position < end:
        header = data[position : position + BLOCK]
        if header == ZEROS:
            break
        _check(header, position)
        kind, size = header[156:157], _number(header[124:136])
        position += BLOCK
        if kind in WITHOUT_DATA:
            given = {}
            continue
        if kind in REGULAR:
            size = int(given.get("size", size))
            name = given.get("path") or _name(header)
            given = {}
            if not name.endswith("/"):  # a folder, in the oldest tars
                found.append(Member(name, position, size))
        elif kind == LONG_NAME:
            given["path"] = _text(data[position : position + size].rstrip(b"\0"))
        elif kind == PAX:
            given |= _pax(data[position : position + size])
        elif kind == PAX_GLOBAL:
            if _pax(data[position : position + size]):
                raise _Unusual
        elif kind != LONG_LINK:
            raise _Unusual
        position += -(-size // BLOCK) * BLOCK
        if position > end:
            raise tarfile.ReadError("unexpected end of data")
    return found


def _check(header: bytes, position: int) -> None:
    if len(header) < BLOCK:
        raise tarfile.ReadError(f"truncated header at byte {position}")
    field = header[148:156]
    wanted = _number(field)
    # The lower half of Adler-32 is 1 + the sum of the bytes, modulo a prime: much faster than sum().
    if zlib.adler32(header) & 0xFFFF == (1 + wanted - SPACES + sum(field)) % ADLER_PRIME:
        return
    signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:]) + SPACES
    if wanted != signed:  # as some tars of old have it
        raise tarfile.ReadError(f"bad checksum of the header at byte {position}")


def _number(field: bytes) -> int:
    """Octal digits, or base 256 after a byte of 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b" \0")
    if b"\0" in digits:
        digits = digits.split(b"\0", 1)[0]
    try:
        return int(digits, 8) if digits.strip() else 0
    except ValueError:
        raise tarfile.ReadError(f"invalid header: a number, not {field!r}") from None


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """The path and size of an extended header: records "LENGTH KEY=VALUE\\n"."""
    found: dict[str, str] = {}
    while data and data[0] != 0:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 5 <= int(length) <= len(data):
            raise tarfile.ReadError("invalid extended header")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key.startswith(b"GNU.sparse") or key == b"hdrcharset":
            raise _Unusual
        if key in (b"path", b"size"):
            found[key.decode()] = _text(value)
        data = data[int(length) :]
    return found
