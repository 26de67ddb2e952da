"""SIGTERM and SIGINT in the workers of a DataLoader."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = {signal.SIGTERM, signal.SIGINT}


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Let SIGTERM and SIGINT wait until the context ends, where the system can."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_by_own_process(worker: int) -> None:
    """Make a worker, which blocks both signals, end if its own process sends SIGTERM.

    torchrun and SLURM send SIGTERM to the workers too, and a terminal SIGINT, when training still needs them for a last step
    and a checkpoint.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # not inherited from a fork server
        threading.Thread(target=wait, daemon=True).start()
