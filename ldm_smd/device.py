"""Device and precision for "auto", and the process group of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState

from .errors import UserError


def pick_device(name: str) -> torch.device:
    """Return the device ``name``; for "auto" the GPU of this process, or the CPU without GPUs."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None and torch.cuda.is_available():
            torch.cuda.set_device(device)  # otherwise pinned memory of loaders takes half a gigabyte of GPU 0
    except RuntimeError as error:
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error
    return device


def pick_precision(name: str, device: torch.device | None = None) -> str:
    """Return accelerate's name for a ``precision`` setting on ``device``; None: a GPU if there is one. "auto" is not bf16 on
    CPUs, where it may be 10-20 times slower."""
    if name != "auto":
        return name
    gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return "bf16" if gpu and torch.cuda.is_bf16_supported() else "no"


@contextmanager
def process_group() -> Iterator[PartialState]:
    """Join the processes of a launcher in a process group, also on CPUs, until the context ends.

    A process that exits while in a group may abort, and the launcher then kills the others.
    """
    gpus = torch.cuda.is_available()
    # NCCL alone cannot reduce and gather what is on the CPU.
    backend = {"backend": "cuda:nccl,cpu:gloo"} if gpus and "LOCAL_RANK" in os.environ else {}
    state = PartialState(cpu=not gpus, **backend)
    try:
        yield state
    finally:
        state.destroy_process_group()
