"""Which actions are executed of chunks that come late."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sqap.control import ActionLimits, Hold, Plan
from sqap.errors import InputError


def chunk(first: float, length: int = 4) -> np.ndarray:
    """Actions of one dimension that count from ``first``."""
    return np.arange(first, first + length, dtype=np.float32)[:, None]


def taken(plan: Plan, count: int) -> list[float | None]:
    return [None if (action := plan.take()) is None else float(action[0]) for _ in range(count)]


def test_a_chunk_is_executed_in_order_and_then_nothing():
    plan = Plan()
    assert taken(plan, 1) == [None]
    assert plan.replace(chunk(0), 0)
    assert (len(plan), plan.due) == (4, 4)
    assert taken(plan, 5) == [0, 1, 2, 3, None]
    assert (plan.executed, plan.due) == (4, 0)


def test_actions_for_the_past_are_left_out():
    plan = Plan()
    plan.replace(chunk(0), 0)
    taken(plan, 2)
    assert plan.replace(chunk(10), 0)
    assert taken(plan, 3) == [12, 13, None]


def test_a_robot_that_held_still_is_where_the_chunk_begins():
    plan = Plan()
    plan.replace(chunk(0), 0)
    taken(plan, 9)
    plan.replace(chunk(10), 4)
    assert taken(plan, 1) == [10]


def test_a_chunk_that_is_all_past_changes_nothing():
    plan = Plan()
    plan.replace(chunk(0, 6), 0)
    taken(plan, 4)
    assert not plan.replace(chunk(10), 0)
    assert taken(plan, 3) == [4, 5, None]


def test_the_rest_of_a_chunk_is_there_when_the_next_is_late():
    plan = Plan(execute=2)
    plan.replace(chunk(0), 0)
    assert plan.due == 2
    assert taken(plan, 3) == [0, 1, 2]
    assert plan.due == 0
    plan.replace(chunk(10), 2)
    assert plan.due == 2
    assert taken(plan, 4) == [11, 12, 13, None]


def test_blending_goes_from_the_old_chunk_to_the_new_evenly():
    plan = Plan(execute=1, blend=3)
    plan.replace(chunk(0, 5), 0)
    taken(plan, 1)
    plan.replace(chunk(100, 5), 1)
    assert taken(plan, 5) == [1 + 0.25 * 99, 2 + 0.5 * 99, 3 + 0.75 * 99, 103, 104]


def test_blending_is_as_long_as_both_chunks_are():
    plan = Plan(blend=3)
    plan.replace(chunk(0, 2), 0)
    taken(plan, 1)
    plan.replace(chunk(11, 4), 1)
    assert taken(plan, 5) == [6, 12, 13, 14, None]


@pytest.mark.parametrize(("execute", "blend"), [(0, 0), (None, -1)])
def test_settings_that_make_no_sense_are_refused(execute, blend):
    with pytest.raises(InputError):
        Plan(execute, blend)


def test_holding_moves_nothing_and_keeps_what_it_should():
    hold = Hold(np.zeros(3), keep=(2,))
    assert hold(None).tolist() == [0, 0, 0]
    assert hold(np.array([1.0, 2, 3])).tolist() == [0, 0, 3]
    assert hold(np.array([1.0, 2, 3])).dtype == np.float32


@pytest.mark.parametrize(
    ("actions", "problem"),
    [
        (np.zeros((3, 2)), None),
        (np.array([[-1.0, 2.0]]), None),
        (np.array([[0.0, 0.0], [0.0, 2.5]]), "dimension 1 of action 1 is 2.5, which must be from -2 to 2"),
        (np.array([[-1.5, 0.0]]), "dimension 0 of action 0 is -1.5, which must be from -1 to 1"),
        (np.array([[np.nan, 0.0]]), "not finite"),
        (np.array([[0.0, np.inf]]), "not finite"),
        (np.zeros((3, 3)), r"must be of shape \(horizon, 2\), got \(3, 3\)"),
        (np.zeros((0, 2)), r"must be of shape \(horizon, 2\), got \(0, 2\)"),
        (np.zeros(2), r"must be of shape \(horizon, 2\)"),
    ],
)
def test_what_a_robot_may_be_sent(actions, problem):
    found = ActionLimits(np.array([-1.0, -2.0]), np.array([1.0, 2.0])).problem(actions)
    assert (found is None) == (problem is None)
    assert problem is None or re.search(problem, found)
