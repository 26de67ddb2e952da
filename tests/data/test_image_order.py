import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_smd.data.order import ImageOrder

counts = st.lists(st.integers(0, 20), min_size=1, max_size=12)


@given(counts, st.integers(1, 5), st.booleans(), st.integers(1, 9))
def test_every_image_has_one_position_for_any_ranges(counts, group_size, shuffle, step):
    order = ImageOrder(np.array(counts), group_size, shuffle)
    all_images = order.images(0, len(order))
    assert sorted(all_images.tolist()) == list(range(sum(counts)))
    ranges = [order.images(first, min(first + step, len(order))) for first in range(0, len(order), step)]
    assert np.concatenate([all_images[:0], *ranges]).tolist() == all_images.tolist()
    if not shuffle:
        assert all_images.tolist() == list(range(sum(counts)))


@given(counts, st.integers(1, 5), st.data())
def test_a_range_of_positions_reads_the_parts_of_its_groups(counts, group_size, data):
    order = ImageOrder(np.array(counts), group_size)
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, min(start + 5, len(order))))
    parts = order.parts(start, stop)
    drawn = np.searchsorted(order.starts, order.images(start, stop), side="right") - 1
    assert set(drawn.tolist()) <= set(parts.tolist())


def test_images_are_shuffled_over_all_parts_but_few_parts_are_read_at_once():
    order = ImageOrder(np.full(100, 1000), group_size=8)
    for first in range(0, 100_000, 1000):
        drawn = set((order.images(first, first + 1000) // 1000).tolist())
        assert 4 <= len(drawn) <= 16 and drawn <= set(order.parts(first, first + 1000).tolist())
    assert ImageOrder(np.full(100, 1000), group_size=100).images(0, 1000).std() > 20_000


def test_workers_that_are_started_anew_get_the_order():
    """Python 3.14 and macOS pickle it for them."""
    order = ImageOrder(np.array([3, 0, 5]), 2)
    assert pickle.loads(pickle.dumps(order)).images(0, 8).tolist() == order.images(0, 8).tolist()


def test_no_images():
    assert len(ImageOrder(np.array([0, 0]), 4).images(0, 0)) == 0
    with pytest.raises(IndexError):
        ImageOrder(np.array([2]), 4).images(0, 1)[1]
