"""Shards come from a store before they are needed, in the order in which they will be."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import UserError

logger = logging.getLogger(__name__)

AHEAD = 3
"""Shards that are fetched before the reader comes to them, where the cache has room for so many."""


class FetchedAhead:
    """A thread that fetches shards, at most a few before the reader, who tells where it is.

    Args:
        visits: (position, shard) of each shard where the reader first comes to it.
        fetch: fetches a shard, or comes back at once where another process is at it.
        ahead: number of shards to be before the reader.
    """

    def __init__(self, visits: Iterator[tuple[int, int]], fetch: Callable[[int], object], ahead: int = AHEAD) -> None:
        self._visits, self._fetch, self._ahead = visits, fetch, ahead
        self._position, self._stopped = -1, False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="shards-ahead", daemon=True)

    @contextmanager
    def running(self) -> Iterator[FetchedAhead]:
        """Fetch until the block ends; what is on its way then comes to its end behind it."""
        self._thread.start()
        try:
            yield self
        finally:
            with self._moved:
                self._stopped = True
                self._moved.notify()

    def reached(self, position: int) -> None:
        """Tell that the reader is at ``position``."""
        with self._moved:
            self._position = position
            self._moved.notify()

    def _run(self) -> None:
        waiting: deque[int] = deque()  # positions of the shards that are there, and the reader is not
        for position, shard in self._visits:
            with self._moved:
                while not self._stopped:
                    while waiting and waiting[0] <= self._position:
                        waiting.popleft()
                    if len(waiting) < self._ahead:
                        break
                    self._moved.wait()
                if self._stopped:
                    return
            try:
                self._fetch(shard)
            except UserError as error:  # the reader will meet it, if it does not pass
                logger.info("%s", error)
            waiting.append(position)
