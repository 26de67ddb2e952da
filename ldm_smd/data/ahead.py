"""Prefetching: shards are fetched from a store before they are needed, in the order of the stream."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import UserError

logger = logging.getLogger(__name__)

AHEAD = 3
"""Number of shards to fetch ahead of the reader."""


class Prefetcher:
    """A thread that fetches a limited number of shards ahead of a reader, which reports its position.

    Args:
        visits: (position, shard) for each shard, with the position at which the reader begins it.
        fetch: fetches a shard, or returns at once if another process is fetching it.
        ahead: number of shards to fetch ahead of the reader.
    """

    def __init__(self, visits: Iterator[tuple[int, int]], fetch: Callable[[int], object], ahead: int = AHEAD) -> None:
        self._visits, self._fetch, self._ahead = visits, fetch, ahead
        self._position, self._stopped = -1, False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="shards-ahead", daemon=True)

    @contextmanager
    def running(self) -> Iterator[Prefetcher]:
        """Fetch until the block ends. A download that is running then continues in the background."""
        self._thread.start()
        try:
            yield self
        finally:
            with self._moved:
                self._stopped = True
                self._moved.notify()

    def reached(self, position: int) -> None:
        """Report that the reader is at ``position``."""
        with self._moved:
            self._position = position
            self._moved.notify()

    def _run(self) -> None:
        waiting: deque[int] = deque()  # positions of fetched shards that the reader has not reached
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
            except UserError as error:  # if it persists, the reader raises it
                logger.info("%s", error)
            waiting.append(position)
