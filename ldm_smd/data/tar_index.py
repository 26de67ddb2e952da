"""The index of a latent shard: the offsets of its samples. Making it checks the headers of the tar."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from .shards import EMBEDDING, FIELDS

MAX_HEADER_BYTES, MAX_LABEL_BYTES, MAX_LABEL = 1024, 32, 2**31


def index_tar(path: Path, shape: tuple[int, ...], dtype: np.dtype, dimensions: int | None = None) -> dict:
    """Return the index of a shard.

    Its items are "keys", in order; "labels", -1 for none; "offsets", at which the values of each of FIELDS begin; and
    "embeddings", their offsets, if ``dimensions`` is given.

    Reads every header, which takes 0.1 ms per sample. tools/encode.py does this once and stores the index in the shard's
    record.

    Raises:
        UserError: the file is not a tar of unique samples of this shape and dtype.
        FileNotFoundError: there is no file. ``FileCache.use`` then fetches it again.
    """
    shapes = dict.fromkeys(FIELDS, shape) | ({EMBEDDING: (dimensions,)} if dimensions else {})
    offsets: dict[str, dict[str, int]] = {name: {} for name in shapes}
    headers: dict[str, dict[bytes, int]] = {name: {} for name in shapes}
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    raise ValueError(f"{member.name} is not a regular file")
                key, _, name = member.name.partition(".")
                if name in shapes:
                    if key in offsets[name]:
                        raise ValueError(f"{member.name} occurs twice")
                    data = read_start(file, member, MAX_HEADER_BYTES)
                    length = npy_header_length(data, member, shapes[name], dtype, headers[name])
                    offsets[name][key] = member.offset_data + length
                elif name == "cls":
                    labels[key] = int(read_start(file, member, MAX_LABEL_BYTES))
                    if abs(labels[key]) > MAX_LABEL:
                        raise ValueError(f"{member.name} is {labels[key]}")
        moments, mirrored = (offsets[name] for name in FIELDS)
        for name, found in offsets.items():
            if found.keys() != moments.keys() and (found or found is not mirrored):
                raise ValueError(f"{len(found)} {name} of {len(moments)} samples")
    except FileNotFoundError:
        raise
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shards: expected a tar of moments {shape} {dtype}, found {path}: {error}") from error
    views = [moments, mirrored] if mirrored else [moments]
    index = {
        "keys": list(moments),
        "labels": [labels.get(key, -1) for key in moments],
        "offsets": [[view[key] for view in views] for key in moments],
    }
    return index | ({"embeddings": [offsets[EMBEDDING][key] for key in moments]} if dimensions else {})


def read_start(file: BinaryIO, member: tarfile.TarInfo, size: int) -> bytes:
    """Read the first ``size`` bytes of a member. Restores the position of the file."""
    position = file.tell()
    file.seek(member.offset_data)
    data = file.read(min(member.size, size))
    file.seek(position)
    return data


def npy_header_length(
    data: bytes, member: tarfile.TarInfo, shape: tuple[int, ...], dtype: np.dtype, known: dict[bytes, int]
) -> int:
    """Return the length of an .npy header.

    Raises ValueError unless the header has this shape and dtype and the member's size fits. Never unpickles.

    Args:
        known: valid headers that were read before, and their lengths.
    """
    length = next((length for header, length in known.items() if data.startswith(header)), None)
    if length is None:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found_shape, fortran, found_dtype = reader(file)
        if found_shape != shape or found_dtype != dtype or fortran:
            raise ValueError(f"{member.name} is {found_shape} {found_dtype}")
        length = known[data[: file.tell()]] = file.tell()
    expected = length + int(np.prod(shape)) * dtype.itemsize
    if member.size != expected:
        raise ValueError(f"{member.name} has {member.size} bytes instead of {expected}")
    return length
