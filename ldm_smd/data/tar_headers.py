"""A fast list of the regular files in a tar: several times as fast as ``tarfile``, because it reads the headers alone.

It reads ustar, GNU and pax names. Tars with rarer features, such as sparse files, are left to ``tarfile``.
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
"""Types of links, devices, folders and pipes."""
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
CHECKSUM_SPACES = sum(b" " * 8)
"""The checksum is computed with spaces in its own field."""
ADLER_PRIME = 65521


class Member(NamedTuple):
    """A regular file: ``size`` bytes at ``offset``."""

    name: str
    offset: int
    size: int


class _Unusual(Exception):
    """The tar has a feature that only ``tarfile`` reads."""


def tar_members(path: str | Path) -> list[Member]:
    """List the regular files of an uncompressed tar in order.

    Raises tarfile.TarError or OSError, also for a damaged header between two files, where ``tarfile`` would silently stop.
    """
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
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
    extended: dict[str, str] = {}  # name and size for the next member, from extended headers
    while position < end:
        header = data[position : position + BLOCK]
        if header == ZEROS:
            break
        _verify_checksum(header, position)
        kind, size = header[156:157], _parse_number(header[124:136])
        position += BLOCK
        if kind in WITHOUT_DATA:
            extended = {}
            continue
        if kind in REGULAR:
            size = int(extended.get("size", size))
            name = extended.get("path") or _name(header)
            extended = {}
            if not name.endswith("/"):  # the oldest tars mark folders by a slash only
                found.append(Member(name, position, size))
        elif kind == LONG_NAME:
            extended["path"] = _text(data[position : position + size].rstrip(b"\0"))
        elif kind == PAX:
            extended |= _pax(data[position : position + size])
        elif kind == PAX_GLOBAL:
            if _pax(data[position : position + size]):
                raise _Unusual
        elif kind != LONG_LINK:
            raise _Unusual
        position += -(-size // BLOCK) * BLOCK
        if position > end:
            raise tarfile.ReadError("unexpected end of data")
    return found


def _verify_checksum(header: bytes, position: int) -> None:
    if len(header) < BLOCK:
        raise tarfile.ReadError(f"truncated header at byte {position}")
    field = header[148:156]
    stored = _parse_number(field)
    # The lower half of Adler-32 is 1 + the sum of the bytes, modulo a prime. It is much faster than sum().
    if zlib.adler32(header) & 0xFFFF == (1 + stored - CHECKSUM_SPACES + sum(field)) % ADLER_PRIME:
        return
    signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:]) + CHECKSUM_SPACES
    if stored != signed:  # some old tars sum signed bytes
        raise tarfile.ReadError(f"bad checksum of the header at byte {position}")


def _parse_number(field: bytes) -> int:
    """Parse octal digits, or base 256 after a byte of 0x80."""
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
    """Return the path and size from an extended header, whose records are "LENGTH KEY=VALUE\\n"."""
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
