"""The simulated servers against queueing theory, and against what is plain without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sqap.capacity import Load, StepTimes, simulate
from sqap.errors import InputError
from sqap.serving import Limits


def run(load: Load, seconds: dict[int, list[float]], replicas: int = 1, length: float = 100.0, **limits: Any):
    return simulate(load, StepTimes(seconds), Limits(**limits), replicas, length, 0.1 * length, seed=1)


@pytest.mark.parametrize("busy", [0.3, 0.7])
def test_the_mean_wait_is_pollaczek_and_khinchines(busy):
    """M/D/1: many robots at random times, one step for each, which always takes as long."""
    step, robots = 0.01, 500
    load = Load(robots, busy / step / robots, poisson=True, waits=False)
    seen = run(load, {1: [step]}, length=600, batch=1, waiting=10**6)
    wait = busy * step / (2 * (1 - busy))
    assert np.mean(seen.latencies) == pytest.approx(step + wait, rel=0.04)
    assert seen.busy / 600 == pytest.approx(busy, rel=0.02)
    assert set(seen.batches) == {1}


def test_the_mean_wait_with_steps_that_vary_is_pollaczek_and_khinchines():
    """M/G/1: the same with half of the steps four times as long as the others."""
    steps, busy, robots = [0.004, 0.016], 0.5, 500
    rate = busy / np.mean(steps)
    seen = run(
        Load(robots, rate / robots, poisson=True, waits=False), {1: steps}, length=600, batch=1, waiting=10**6
    )
    wait = rate * np.mean(np.square(steps)) / (2 * (1 - busy))
    assert np.mean(seen.latencies) == pytest.approx(np.mean(steps) + wait, rel=0.04)


def test_without_others_an_answer_takes_as_long_as_its_step():
    seen = run(Load(3, 2.0), {1: [0.05]}, replicas=3)
    assert seen.latencies == pytest.approx([0.05] * len(seen.latencies))
    assert len(seen.latencies) == pytest.approx(600, abs=3)
    assert seen.outcomes["acted"] == len(seen.latencies)


def test_robots_that_wait_for_their_answers_are_slowed_down_and_lose_nothing():
    """Four robots, of which a step for each alone could serve two."""
    seen = run(Load(4, 20.0), {1: [0.1], 4: [0.4]}, batch=1)
    assert len(seen.latencies) == pytest.approx(1000, rel=0.01)
    assert seen.latencies == pytest.approx([0.4] * len(seen.latencies), rel=0.01), "each waits for three"
    assert set(seen.outcomes) == {"acted"}


def test_all_that_wait_are_one_batch_up_to_the_limit():
    """Eight robots ask all the time, and a step takes as long for eight as for one.

    The first to come is acted on alone, since nobody waits for a batch to fill; then all others are there.
    """
    together = run(Load(8, 1000.0), {1: [0.1], 8: [0.1]}, batch=16)
    assert set(together.batches) == {1, 7}
    assert len(together.latencies) == pytest.approx(4 * 1000, rel=0.01)
    limited = run(Load(8, 1000.0), {1: [0.1], 8: [0.1]}, batch=2)
    assert len(limited.latencies) == pytest.approx(2 * 1000, rel=0.01)
    assert set(limited.batches) == {2}


def test_the_latest_observation_of_a_robot_wins():
    """Ten observations come during a step, of which the last is acted on next."""
    seen = run(Load(1, 100.0, waits=False), {1: [0.0999]})
    assert seen.outcomes["acted"] == pytest.approx(1000, rel=0.01)
    assert seen.outcomes["superseded"] == pytest.approx(9000, rel=0.01)
    assert max(seen.latencies) < 0.0999 + 0.011, "it came within the last period of the step before"


def test_a_full_line_refuses_and_late_observations_are_dropped():
    refused = run(Load(10, 10.0), {1: [1.0], 10: [10.0]}, batch=1, waiting=2).outcomes
    assert refused["refused"] > refused["acted"] > 90
    late = run(Load(10, 10.0, deadline_s=1.5), {1: [1.0], 10: [10.0]}, batch=1).outcomes
    assert late["late"] > late["acted"] > 60
    assert late["refused"] == 0


def test_the_network_is_added_to_every_answer():
    seen = run(Load(1, 5.0, network_s=0.02), {1: [0.05]})
    assert np.mean(seen.latencies) == pytest.approx(0.07, rel=0.02)
    assert 0.06 <= min(seen.latencies) < max(seen.latencies) <= 0.08


def test_the_same_seed_gives_the_same_run():
    arguments = Load(5, 7.0, poisson=True), StepTimes({1: [0.03, 0.2], 5: [0.4]}), Limits(), 2, 30.0, 5.0
    first, again, other = (simulate(*arguments, seed=seed).latencies for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_step_of_a_size_that_was_not_measured_lies_between_its_neighbours():
    times = StepTimes({1: [0.1, 0.3], 4: [0.4, 0.6]})
    assert [times.draw(1, chance) for chance in (0.0, 0.49, 0.5, 0.99)] == [0.1, 0.1, 0.3, 0.3]
    assert times.draw(2, 0.0) == pytest.approx(0.2)
    assert times.draw(8, 0.0) == pytest.approx(0.8), "in proportion beyond the largest"
    assert times.mean(1) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Load(0, 1.0), "robots must be a positive number, got 0"),
        (lambda: Load(1, float("nan")), "rate_hz must be a positive number, got nan"),
        (lambda: Load(1, 1.0, network_s=-1), "network_s must be zero or more, got -1"),
        (lambda: Load(1, 1.0, deadline_s=0.0), "deadline_s must be positive, got 0"),
        (lambda: StepTimes({2: [0.1]}), "none of a step for one robot"),
        (lambda: StepTimes({1: [0.1], 2: [0.0]}), "a step for 2 robots must be positive"),
    ],
)
def test_what_cannot_be_is_a_sentence(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
