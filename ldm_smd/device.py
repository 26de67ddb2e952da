"""What "auto" means: the device and the precision of this machine; and the processes that share a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState

from .errors import UserError


def pick_device(name: str) -> torch.device:
    """The device called ``name``; for "auto" the GPU where there is one, of several processes on a node each its own."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error


def pick_precision(name: str) -> str:
    """accelerate's name for a ``precision`` setting. CPUs without bf16 units run bf16 10-20 times slower than float32."""
    if name != "auto":
        return name
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


@contextmanager
def process_group() -> Iterator[PartialState]:
    """The processes of a launcher as one group, on CPUs too.

    The group ends with the block. A process that exits as a member of one may abort, and the launcher then ends the others,
    whatever they are still doing.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield state
    finally:
        state.destroy_process_group()
