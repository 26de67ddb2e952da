"""SIGTERM, which cluster schedulers send before they kill a job, and SIGINT, of Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Give a list that SIGTERM and the first SIGINT append themselves to, in place of their default action.

    A second SIGINT raises KeyboardInterrupt. Outside the main thread, nothing is appended.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        received.append(signal.Signals(number))

    # A shell lets its background jobs ignore Ctrl-C.
    noted = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in noted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_stopped(reason: signal.Signals, images_seen: int, prints: bool = True) -> NoReturn:
    """Exit with the code of the signal, after a checkpoint was saved."""
    if prints:
        print(f"stopped by {reason.name} after {images_seen} images; run the same command to resume", file=sys.stderr)
    sys.exit(128 + reason)
