"""The control loop against a simulated robot, clock and delays, and against a server that dies."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest

from sqap import environments
from sqap.control import ActionLimits, Hold, Loop
from sqap.control.simulated import Delayed, SimulatedClock
from sqap.errors import InputError
from sqap.evaluation.rollout import run_episode
from sqap.policy import Step

PERIOD = 0.1
LIMITS = ActionLimits(np.full(4, -1000.0), np.full(4, 1000.0))
HOLD = Hold(np.zeros(4), keep=(3,))


class Counter:
    """A robot whose state counts the actions that moved it, and an actor that continues the count.

    Action number n of an episode should be [n, 0, 0, 1]: whatever is skipped or done twice shows.
    """

    def __init__(self, observe, clock: SimulatedClock | None = None, horizon: int = 8) -> None:
        self.sent: list[np.ndarray] = []
        self.times: list[float] = []
        self.stops = 0
        self.horizon = horizon
        self.calls = 0
        self.change: Callable[[int, np.ndarray], np.ndarray] = lambda call, chunk: chunk
        self._observe, self._clock = observe, clock

    @property
    def moved(self) -> int:
        return sum(action[3] == 1 and action[0] > 0 for action in self.sent)

    def observe(self):
        return dataclasses.replace(self._observe(), state=np.array([float(self.moved)]))

    def apply(self, action: np.ndarray) -> None:
        self.sent.append(np.array(action))
        if self._clock is not None:
            self.times.append(self._clock.now())

    def stop(self) -> None:
        self.stops += 1

    def step(self, observation, *, seed=None, memory=None) -> Step:
        first = observation.state[0] + 1
        chunk = np.zeros((self.horizon, 4), np.float32)
        chunk[:, 0], chunk[:, 3] = np.arange(first, first + self.horizon), 1
        self.calls += 1
        return Step(self.change(self.calls, chunk), memory=(memory or 0) + 1)


def simulate(observe, delays: Callable[[], float] | float, ticks: int, prepare=lambda robot: None, **options):
    """A run of ``ticks`` periods with delays in periods."""
    clock = SimulatedClock()
    robot = Counter(observe, clock)
    prepare(robot)
    next_delay = delays if callable(delays) else lambda: float(delays)
    settings = {"limits": LIMITS, "hold": HOLD} | options
    executor = Delayed(clock, lambda: PERIOD * next_delay())
    loop = Loop(robot, robot, 1 / PERIOD, clock=clock, executor=executor, **settings)
    return robot, loop.run(ticks)


def numbers(robot: Counter) -> list[int]:
    return [round(float(action[0])) for action in robot.sent]


@pytest.mark.parametrize("delay", [0, 1, 2, 3.5, 4])
def test_no_action_is_skipped_done_twice_or_waited_for_while_the_policy_is_fast_enough(observe, delay):
    robot, report = simulate(observe, delay, 60)
    waited = int(np.ceil(delay))
    assert numbers(robot) == [0] * waited + list(range(1, 61 - waited))
    assert (report.held, report.executed) == (waited, 60 - waited)
    assert not report.faults
    assert set(report.delays) <= {waited}
    assert np.allclose(robot.times, PERIOD * np.arange(60))


def test_the_next_chunk_is_asked_for_no_earlier_than_its_delay_needs(observe):
    _, report = simulate(observe, 2, 62)
    assert report.chunks == 1 + 59 // 6  # the first is executed whole, two of each other are past


def test_a_policy_slower_than_its_chunks_is_held_for_between_them(observe):
    robot, report = simulate(observe, 10, 60)
    moving = [n for n in numbers(robot) if n]
    assert moving == list(range(1, len(moving) + 1))
    assert report.held == 60 - len(moving)
    assert report.counts["late"] > 0
    assert report.counts["obsolete"] == 1, "before it is known how long a step takes"
    held = [action for action in robot.sent[11:] if not action[0]]
    assert held
    assert all(action.tolist() == [0, 0, 0, 1] for action in held), "the gripper stays as it was"


def test_a_delay_that_varies_is_foreseen_by_the_longest(observe):
    delays = iter([1, 4, 1, 1, 4, 1, 1] * 20)
    robot, report = simulate(observe, lambda: next(delays), 100)
    moving = [n for n in numbers(robot) if n]
    assert moving == list(range(1, len(moving) + 1))
    assert report.counts["late"] <= 1, "before it is known how long it may take"


def test_the_first_delay_is_of_the_warm_up_and_counts_no_longer_than_it_must(observe):
    delays = iter([30, *[1] * 100])
    _, report = simulate(observe, lambda: next(delays), 100)
    assert set(report.delays) == {1}
    assert report.held == 30
    assert report.chunks < 14


def test_with_execute_the_rest_of_a_chunk_bridges_a_late_one(observe):
    delays = iter([1, 1, 1, 5, *[1] * 100])
    robot, report = simulate(observe, lambda: next(delays), 50, execute=3)
    assert numbers(robot) == [0, *range(1, 50)]
    assert report.held == 1
    assert report.counts["late"] == 0


def test_a_new_chunk_takes_over_from_the_rest_of_the_old_one_evenly_unless_told_not_to(observe):
    def tens(robot: Counter) -> None:
        robot.change = lambda call, chunk: np.full_like(chunk, 10 * call)

    blended, _ = simulate(observe, 0, 3, tens, execute=1)
    assert [action[0] for action in blended.sent] == [10, 12.5, 0.75 * 15 + 0.25 * 30]
    switched, _ = simulate(observe, 0, 3, tens, execute=1, blend=0)
    assert [action[0] for action in switched.sent] == [10, 20, 30]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1001.0])
def test_a_chunk_that_must_not_be_sent_is_refused_whole(observe, bad):
    def spoil(robot: Counter) -> None:
        def change(call: int, chunk: np.ndarray) -> np.ndarray:
            if call == 3:
                chunk[5, 1] = bad
            return chunk

        robot.change = change

    robot, report = simulate(observe, 1, 40, spoil)
    moving = [n for n in numbers(robot) if n]
    assert moving == list(range(1, len(moving) + 1))
    assert report.counts["refused"] == 1
    assert np.isfinite(robot.sent).all()
    assert np.abs(robot.sent).max() <= 1000
    assert report.stopped is None


def test_a_policy_that_fails_is_asked_again_and_the_robot_is_held(observe):
    def fail(robot: Counter) -> None:
        def change(call: int, chunk: np.ndarray) -> np.ndarray:
            if 3 <= call < 9:
                raise RuntimeError("gone\nfishing")
            return chunk

        robot.change = change

    robot, report = simulate(observe, 1, 60, fail)
    moving = [n for n in numbers(robot) if n]
    assert moving == list(range(1, len(moving) + 1))
    assert report.counts["failed"] == 6
    assert any(fault.what == "failed: RuntimeError: gone\\nfishing" for fault in report.faults)
    assert numbers(robot)[-1] > 40


def test_holding_ends_with_a_stop(observe):
    delays = iter([1, 1, *[1000] * 10])
    robot, report = simulate(observe, lambda: next(delays), 100, stop_after_s=0.5)
    assert report.stopped == "the policy gave no action for 0.50 s"
    assert robot.stops == 1
    assert report.held == 1 + 5
    assert report.ticks < 30


def test_without_a_way_to_hold_it_stops_at_once_but_waits_for_the_first_chunk(observe):
    delays = iter([3, 1, *[1000] * 10])
    robot, report = simulate(observe, lambda: next(delays), 100, hold=None)
    assert numbers(robot) == list(range(1, len(robot.sent) + 1))
    assert report.stopped is not None
    assert "nothing to hold the robot with" in report.stopped
    assert (robot.stops, report.held) == (1, 0)


def test_a_robot_that_fails_is_stopped_and_the_error_leaves(observe):
    def broken(robot: Counter) -> None:
        def apply(action):
            raise OSError("the arm is unplugged")

        robot.apply = apply
        broken.robot = robot

    with pytest.raises(OSError, match="unplugged"):
        simulate(observe, 0, 10, broken)
    assert broken.robot.stops == 1


def test_a_robot_that_takes_too_long_moves_the_schedule_and_is_counted(observe):
    clock = SimulatedClock()
    robot = Counter(observe, clock)
    original = robot.apply

    def slow(action):
        original(action)
        clock.sleep(3.5 * PERIOD if len(robot.sent) == 5 else 0)

    robot.apply = slow
    report = Loop(
        robot, robot, 1 / PERIOD, limits=LIMITS, hold=HOLD, clock=clock, executor=Delayed(clock, lambda: 0.0)
    ).run(10)
    assert report.overruns == 1
    gaps = np.diff(robot.times) / PERIOD
    assert np.allclose(gaps, [1, 1, 1, 1, 3.5, 1, 1, 1, 1]), "no burst makes up for it"


def test_the_wall_clock_may_jump(observe, monkeypatch):
    """Backwards and far ahead: the loop's own clock is monotonic."""
    robot, walls = Counter(observe), iter([0.0, 1e12] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(walls))
    begin = time.monotonic()
    report = Loop(robot, robot, 200, limits=LIMITS, hold=HOLD, stop_after_s=5.0).run(40)
    assert report.stopped is None
    assert report.executed > 0
    assert time.monotonic() - begin >= 39 / 200


def test_memory_goes_from_step_to_step_and_a_run_begins_without(observe):
    seen = []

    class Remembers(Counter):
        def step(self, observation, *, seed=None, memory=None):
            seen.append((memory, seed))
            return super().step(observation, seed=seed, memory=memory)

        def reset(self):
            seen.append("reset")

    clock = SimulatedClock()
    robot = Remembers(observe, clock)
    loop = Loop(
        robot, robot, 10, limits=LIMITS, hold=HOLD, seed=7, clock=clock, executor=Delayed(clock, lambda: 0)
    )
    for _ in range(2):
        loop.run(20)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert seen[0] == "reset"
    assert [memory for memory, _ in seen[1:half]] == [None, 1, 2]
    assert len({seed for _, seed in seen[1:half]}) == 3


def test_a_rate_is_positive(observe):
    robot = Counter(observe)
    with pytest.raises(InputError, match="rate must be positive"):
        Loop(robot, robot, 0, limits=LIMITS, hold=HOLD)


class Arm:
    """A simulator as a robot."""

    def __init__(self, env, seed: int) -> None:
        self.env, self.first = env, env.reset(seed)
        self.steps, self.success, self.over = 0, False, False

    def observe(self):
        return self.first if self.steps == 0 else self.env.observe()

    def apply(self, action) -> None:
        result = self.env.step(action)
        self.steps += 1
        self.success, self.over = self.success or result.success, result.success or result.truncated

    def stop(self) -> None:
        self.over = True


def test_without_delay_it_is_the_evaluations_rollout(policy):
    env = environments.make("metaworld", "reach")
    env.max_steps = 20
    arm, clock = Arm(env, 5), SimulatedClock()
    executor, limits = Delayed(clock, lambda: 0.0), ActionLimits(np.full(4, -5.0), np.full(4, 5.0))
    loop = Loop(policy, arm, 40, limits=limits, hold=HOLD, seed=5, clock=clock, executor=executor)
    report = loop.run(until=lambda: arm.over)
    loop_place = env.state_vector
    episode = run_episode(policy, env, 5)
    assert (arm.steps, arm.success) == (episode.steps, episode.success)
    assert np.array_equal(loop_place, env.state_vector)
    assert report.held == 0
    env.close()


def test_in_real_time_a_period_is_kept_while_the_policy_computes(observe):
    robot = Counter(observe)

    class Slow(Counter):
        def step(self, observation, *, seed=None, memory=None):
            time.sleep(0.05)
            return super().step(observation, seed=seed, memory=memory)

    begin = time.monotonic()
    report = Loop(Slow(observe), robot, 50, limits=LIMITS, hold=HOLD).run(50)
    assert time.monotonic() - begin > 0.9
    moving = [n for n in numbers(robot) if n]
    assert moving == list(range(1, len(moving) + 1))
    assert report.executed == len(moving) > 20
