import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_smd.data.mixing import Mixing

counts = st.lists(st.integers(0, 20), min_size=1, max_size=12)


@given(counts, st.integers(1, 5), st.booleans(), st.integers(1, 9))
def test_every_picture_has_one_position_however_it_is_asked_for(counts, group, shuffle, step):
    mixing = Mixing(np.array(counts), group, shuffle)
    whole = mixing.pictures(0, len(mixing))
    assert sorted(whole.tolist()) == list(range(sum(counts)))
    parts = [mixing.pictures(first, min(first + step, len(mixing))) for first in range(0, len(mixing), step)]
    assert np.concatenate([whole[:0], *parts]).tolist() == whole.tolist()
    if not shuffle:
        assert whole.tolist() == list(range(sum(counts)))


@given(counts, st.integers(1, 5), st.data())
def test_a_run_of_positions_draws_from_the_parts_of_its_groups(counts, group, data):
    mixing = Mixing(np.array(counts), group)
    first = data.draw(st.integers(0, len(mixing)))
    stop = data.draw(st.integers(first, min(first + 5, len(mixing))))
    parts = mixing.parts(first, stop)
    drawn = np.searchsorted(mixing.starts, mixing.pictures(first, stop), side="right") - 1
    assert set(drawn.tolist()) <= set(parts.tolist())


def test_few_parts_at_a_time_and_all_of_them_mixed():
    mixing = Mixing(np.full(100, 1000), group=8)
    for first in range(0, 100_000, 1000):
        drawn = set((mixing.pictures(first, first + 1000) // 1000).tolist())
        assert 4 <= len(drawn) <= 16 and drawn <= set(mixing.parts(first, first + 1000).tolist())
    assert Mixing(np.full(100, 1000), group=100).pictures(0, 1000).std() > 20_000


def test_no_pictures():
    assert len(Mixing(np.array([0, 0]), 4).pictures(0, 0)) == 0
    with pytest.raises(IndexError):
        Mixing(np.array([2]), 4).pictures(0, 1)[1]
