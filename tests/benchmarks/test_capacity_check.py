"""Predicted against measured: the server's own step times, and runs as long as what was measured."""

from __future__ import annotations

import pytest
from capacity_check import merged, predict, steps_of, table
from robots import Seen

from sqap.capacity import Load, StepTimes


def test_a_step_for_several_robots_is_one_step():
    seen = Seen(batches=[1, 2, 2, 2, 2, 1], infer=[10.0, 15.0, 15.0, 16.0, 16.0, 11.0])
    assert steps_of(seen).seconds == {1: [0.01, 0.011], 2: [0.015, 0.016]}
    only = Seen(batches=[2, 2], infer=[16.0, 16.0])
    assert steps_of(only).seconds == {1: [0.008], 2: [0.016]}


def test_what_was_timed_in_turns_is_put_together():
    parts = [StepTimes({1: [0.1], 2: [0.2]}), StepTimes({1: [0.3], 2: [0.4]})]
    assert merged(parts).seconds == {1: [0.1, 0.3], 2: [0.2, 0.4]}


def test_a_robot_alone_is_predicted_exactly_and_two_with_a_range():
    times = StepTimes({1: [0.05], 2: [0.1]})
    alone = predict(times, Load(1, 10.0), 16, 2.0, 2, runs=5)
    assert alone["p99_ms"] == pytest.approx({"low": 50, "median": 50, "high": 50})
    two = predict(times, Load(2, 10.0), 1, 2.0, 2, runs=20)
    assert 50 <= two["p50_ms"]["low"] <= two["p50_ms"]["median"] <= two["p99_ms"]["high"] <= 100.001
    assert two["p99_ms"]["low"] < two["p99_ms"]["high"]
    row = {"robots": 2, "measured": {"p50_ms": 1.0, "p99_ms": 2.0}, "apart": two, "inside": two}
    assert table([row]).row_count == 2
