"""SIGTERM, which cluster schedulers send before they kill a job."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def sigterm_flag() -> Iterator[threading.Event]:
    """Give an event that SIGTERM sets, in place of its default action. Outside the main thread, nothing sets it."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: flag.set())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
