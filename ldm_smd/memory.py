"""Reuse of freed memory."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt (malloc.h)."""


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory, where by default it returns large blocks to the system.

    PyTorch allocates the activations of each layer anew. A returned block must be mapped and zeroed again, page by page. On
    virtual machines this may take as long as the computation. All threads share one arena, because the heaps of the others are
    too small for large blocks. Peak memory is a little higher (docs/results.md has both).

    It does nothing with another C library, or if the environment has its own settings of malloc.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # not glibc; TypeError on Windows
        return
    mallopt(ARENA_MAX, 1)
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)  # never
