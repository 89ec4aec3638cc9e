"""Between which numbers a policy's actions are."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sqap.processing import AddState, Binarize, Clamp, MeanStd, Range, Take, action_bounds, unnormalize

RANGE = Range(low=(-0.5, 2.0, 0.0), high=(0.5, 4.0, 1.0), mask=(True, True, False))


def test_the_ends_of_a_range_and_what_is_not_scaled():
    bounds = action_bounds((Clamp(), RANGE), 3)
    assert bounds is not None
    assert [end.tolist() for end in bounds] == [[-0.5, 2, -1], [0.5, 4, 1]]


def test_the_lower_end_is_the_least_whatever_the_step_turns_round():
    steps = Clamp(), Binarize((2,), low=1.0, high=0.0), MeanStd((0.0, 1.0, 0.0), (1.0, -2.0, 1.0)), Take(3)
    bounds = action_bounds(steps, 3)
    assert bounds is not None
    assert [end.tolist() for end in bounds] == [[-1, -1, 0], [1, 3, 1]]


def test_without_a_clamp_in_front_or_relative_to_a_state_there_are_none():
    assert action_bounds((), 3) is None
    assert action_bounds((RANGE,), 3) is None
    assert action_bounds((RANGE, Clamp()), 3) is None
    assert action_bounds((Clamp(), RANGE, AddState((0,))), 3) is None


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3))
def test_nothing_that_a_model_gives_is_beyond(values):
    steps = Clamp(), RANGE
    bounds = action_bounds(steps, 3)
    action = unnormalize(np.array([values], np.float32), steps)[0]
    assert bounds is not None
    assert (bounds[0] <= action).all()
    assert (action <= bounds[1]).all()
