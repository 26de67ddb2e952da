"""The order in which pictures go into the latent shards: mixed, but from few parts of the source at a time.

Parts (tars, or runs of pictures of other sources) are permuted, then taken in groups, and the pictures of a group are permuted.
It is a pure function of the parts' counts. A shard so reads from at most the parts of the groups that it lies in, and each
group is read once: what a permutation over all pictures could not have, where tars come over a network or from slow disks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SEED = 0


class Mixing:
    """Picture at each position of the output, for sources of any length in little memory.

    Args:
        counts: pictures in each part, in the order of the source.
        group: parts that are mixed with each other.
        shuffle: False keeps the order of the source.
    """

    def __init__(self, counts: np.ndarray, group: int, shuffle: bool = True) -> None:
        self.counts, self.shuffle = np.asarray(counts, dtype=np.int64), shuffle
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        parts = np.random.default_rng(SEED).permutation(len(self.counts)) if shuffle else np.arange(len(self.counts))
        self.groups = [parts[first : first + group] for first in range(0, len(parts), group)]
        self.ends = np.cumsum([self.counts[members].sum() for members in self.groups], dtype=np.int64)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def parts(self, first: int, stop: int) -> np.ndarray:
        """Return the parts that the positions from ``first`` to before ``stop`` draw from."""
        return np.concatenate([np.empty(0, np.int64), *(self.groups[number] for number in self._groups(first, stop))])

    def pictures(self, first: int, stop: int) -> np.ndarray:
        """Return the numbers of the pictures, int64, at the positions from ``first`` to before ``stop``."""
        if not self.shuffle:
            return np.arange(first, stop)
        found = []
        for number in self._groups(first, stop):
            order, end = self._order(number), int(self.ends[number])
            begin = end - len(order)
            found.append(order[max(first - begin, 0) : stop - begin])
        return np.concatenate([np.empty(0, np.int64), *found])

    def _groups(self, first: int, stop: int) -> range:
        if first >= stop:
            return range(0)
        return range(int(np.searchsorted(self.ends, first, "right")), int(np.searchsorted(self.ends, stop, "left")) + 1)

    def _order_of(self, group: int) -> np.ndarray:
        pictures = np.concatenate([np.arange(self.starts[part], self.starts[part + 1]) for part in self.groups[group]])
        return np.random.default_rng((SEED, group)).permutation(pictures)
