"""Even, deterministic choices."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sqap.frames.selection import deal, looks, spread


@given(st.integers(0, 500), st.integers(1, 500))
def test_spread_is_even_and_never_more_than_there_are(total, count):
    chosen = spread(total, count)
    assert len(chosen) == min(total, count)
    assert all(0 <= i < total for i in chosen)
    edges = np.diff([-1, *chosen, total])
    assert (edges > 0).all()
    if len(chosen) > 1:
        assert np.ptp(np.diff(chosen)) <= 1


def test_spread_takes_the_middle_of_equal_stretches():
    assert spread(9, 3) == [1, 4, 7]
    assert spread(5, 1) == [2]
    assert spread(3, 8) == [0, 1, 2]


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(0, 200))
def test_deal_is_as_even_as_the_capacities_allow(capacities, count):
    shares = deal(capacities, count)
    assert sum(shares) == min(count, sum(capacities))
    for share, capacity in zip(shares, capacities, strict=True):
        assert 0 <= share <= capacity
        assert share == capacity or share >= max(shares) - 1


def test_deal_spreads_what_does_not_come_out_even():
    assert deal([9, 9, 9, 9, 9], 7) == [1, 2, 1, 2, 1]
    assert deal([9, 9, 9, 9], 1) == [0, 0, 1, 0]


@given(st.data(), st.integers(1, 1000), st.integers(0, 10**6))
def test_looks_are_evenly_spaced_frames_of_the_episode(data, length, episode):
    count = data.draw(st.integers(0, length))
    chosen = looks(length, count, episode)
    assert len(chosen) == count
    assert all(0 <= i < length for i in chosen)
    if count > 1:
        steps = np.diff(chosen)
        assert steps.min() >= 1
        assert np.ptp(steps) <= 1


def test_one_look_at_each_episode_shows_every_stage():
    stages = [looks(100, 1, episode)[0] // 10 for episode in range(100)]
    assert (np.abs(np.bincount(stages, minlength=10) - 10) <= 2).all()
