"""What a policy sees while it acts in a simulator."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from sqap import environments
from sqap.environments import StepResult
from sqap.errors import InputError
from sqap.frames import collect_frames
from sqap.frames.simulator import CALIBRATION_SEED, LOOKS_PER_EPISODE
from sqap.observation import Observation

TASKS = ("drawer-open", "door-open", "coffee-button")


class Counter:
    """A simulator whose picture shows the episode and the steps done; an episode ends after ``length``."""

    def __init__(self, task: str, length: int = 1000) -> None:
        self.task, self.length, self.closed = task, length, False

    def reset(self, seed: int) -> Observation:
        self.episode, self.steps = seed - CALIBRATION_SEED, 0
        return self.observe()

    def step(self, action: np.ndarray) -> StepResult:
        self.steps += 1
        return StepResult(success=False, truncated=self.steps >= self.length)

    def observe(self) -> Observation:
        image = np.full((2, 2, 3), (self.episode, self.steps, 0), dtype=np.uint8)
        return Observation({"front": image}, self.task)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def simulators(monkeypatch) -> Iterator[list[Counter]]:
    """Every simulator that was made."""
    made: list[Counter] = []

    def make(env: str, task: str, length: int = 1000) -> Counter:
        made.append(Counter(task, length))
        return made[-1]

    monkeypatch.setattr(environments, "make", make)
    yield made
    assert all(simulator.closed for simulator in made)


def acts(chunk: int = 4) -> SimpleNamespace:
    return SimpleNamespace(
        step=lambda observation, seed, memory: SimpleNamespace(chunk=np.zeros((chunk, 4)), memory=None)
    )


def seen(frames: list[Observation]) -> list[tuple[str, int, int]]:
    """Task, episode and step of each frame."""
    return [(f.instruction, *f.images["front"][0, 0, :2].tolist()) for f in frames]


def test_frames_are_spread_over_the_tasks_and_the_first_looks(simulators):
    frames = collect_frames(acts(), "metaworld", TASKS, 7)
    assert seen(frames) == [
        ("drawer-open", 0, 0),
        ("drawer-open", 0, 4),
        ("drawer-open", 0, 8),
        ("door-open", 0, 0),
        ("door-open", 0, 4),
        ("coffee-button", 0, 0),
        ("coffee-button", 0, 4),
    ]


def test_after_some_looks_or_at_its_end_the_next_episode_starts(simulators, monkeypatch):
    many = LOOKS_PER_EPISODE + 1
    frames = collect_frames(acts(), "metaworld", TASKS[:1], many)
    assert seen(frames)[-1] == ("drawer-open", 1, 0)
    monkeypatch.setattr(environments, "make", lambda env, task: Counter(task, length=5))
    frames = collect_frames(acts(), "metaworld", TASKS[:1], 4)
    assert [place[1:] for place in seen(frames)] == [(0, 0), (0, 4), (1, 0), (1, 4)]


def test_a_task_without_a_share_is_not_started(simulators):
    counted: list[tuple[int, int]] = []
    collect_frames(acts(), "metaworld", TASKS, 2, lambda done, total: counted.append((done, total)))
    assert [simulator.task for simulator in simulators] == list(TASKS[:2])
    assert counted == [(1, 2), (2, 2), (2, 2)]


def test_a_simulator_is_closed_even_when_the_policy_fails(simulators):
    def fail(observation: Observation, seed: int, memory: None) -> None:
        raise InputError("no such camera")

    with pytest.raises(InputError):
        collect_frames(SimpleNamespace(step=fail), "metaworld", TASKS, 2)
    assert len(simulators) == 1


def test_unknown_tasks_are_refused():
    with pytest.raises(InputError, match="unknown metaworld task 'drawer'"):
        collect_frames(acts(), "metaworld", ["drawer"], 2)
