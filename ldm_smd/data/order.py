"""The order of the images in the latent shards: shuffled, but from few parts of the source at a time.

The parts (tars, or runs of consecutive images of any other source) are shuffled and split into groups. Then the images of each
group are shuffled. The order is a pure function of the number of images in each part. A shard therefore reads only the parts
of the groups that it lies in, and each group is read once. A permutation of all images would read every tar for every shard,
which is too slow over a network or from hard disks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SEED = 0


class ImageOrder:
    """Image at each position of the output. Takes little memory for sources of any length.

    Args:
        counts: number of images in each part, in the order of the source.
        group_size: number of parts that are shuffled together.
        shuffle: False keeps the order of the source, and each part is a group.
    """

    def __init__(self, counts: np.ndarray, group_size: int, shuffle: bool = True) -> None:
        self.counts, self.shuffle = np.asarray(counts, dtype=np.int64), shuffle
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        parts = np.random.default_rng(SEED).permutation(len(self.counts)) if shuffle else np.arange(len(self.counts))
        group_size = group_size if shuffle else 1
        self.groups = [parts[first : first + group_size] for first in range(0, len(parts), group_size)]
        self.ends = np.cumsum([self.counts[members].sum() for members in self.groups], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def parts(self, start: int, stop: int) -> np.ndarray:
        """Return the parts that may be read for the positions from ``start`` up to, not including, ``stop``."""
        return np.concatenate([np.empty(0, np.int64), *(self.groups[group] for group in self._groups(start, stop))])

    def images(self, start: int, stop: int) -> np.ndarray:
        """Return the source indices (int64) of the images at the positions from ``start`` up to, not including, ``stop``."""
        if not self.shuffle:
            return np.arange(start, stop)
        found = []
        for group in self._groups(start, stop):
            order, end = group_order(self, group), int(self.ends[group])
            begin = end - len(order)
            found.append(order[max(start - begin, 0) : stop - begin])
        return np.concatenate([np.empty(0, np.int64), *found])

    def _groups(self, start: int, stop: int) -> range:
        if start >= stop:
            return range(0)
        return range(int(np.searchsorted(self.ends, start, "right")), int(np.searchsorted(self.ends, stop, "left")) + 1)


@lru_cache(maxsize=2)  # not in the class, whose objects are pickled for workers
def group_order(order: ImageOrder, group: int) -> np.ndarray:
    """Return the source indices (int64) of the images of a group, shuffled."""
    images = np.concatenate([np.arange(order.starts[part], order.starts[part + 1]) for part in order.groups[group]])
    return np.random.default_rng((SEED, group)).permutation(images)
