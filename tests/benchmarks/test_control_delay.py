"""Success against delay: waiting for a step costs its periods, and a plot is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from control_delay import RIVAL, WAYS, compare, episode, plot, summarize
from PIL import Image

from sqap import Observation
from sqap.environments import StepResult
from sqap.policy import Step

GOAL = 12.0


class Line:
    """A point that has to be moved ``GOAL`` to the right."""

    task, action_dim, max_steps = "line", 4, 60

    def reset(self, seed: int) -> Observation:
        self.place, self.steps = 0.0, 0
        return self.observe()

    def observe(self) -> Observation:
        return Observation({"front": np.zeros((2, 2, 3), np.uint8)}, "go right", np.array([self.place]))

    def step(self, action: np.ndarray) -> StepResult:
        self.place, self.steps = self.place + float(action[0]), self.steps + 1
        return StepResult(abs(self.place - GOAL) < 0.5, self.steps >= self.max_steps)

    def close(self) -> None: ...


class ToTheGoal:
    def step(self, observation, *, seed=None, memory=None) -> Step:
        chunk = np.zeros((8, 4), np.float32)
        ahead = GOAL - observation.state[0]
        chunk[:, 0] = np.clip(ahead - np.arange(8), 0, 1)
        return Step(chunk)


def test_waiting_takes_the_delay_again_for_every_chunk_and_the_loop_once(tmp_path: Path):
    episodes = [episode(ToTheGoal(), Line(), way, delay, 1) for way in WAYS for delay in (0, 3)]
    assert all(e["success"] for e in episodes)
    steps = {(e["way"], e["delay"]): e["steps"] for e in episodes}
    assert {steps[way.name, 0] for way in WAYS} == {12}
    assert steps["wait", 3] == 12 + 2 * 3
    assert {steps[way.name, 3] for way in WAYS[1:]} == {12 + 3}

    rows = summarize(episodes)
    assert [(row["way"], row["delay"]) for row in rows] == [(way.name, d) for way in WAYS for d in (0, 3)]
    assert all(row["success"] == 1 and row["low"] < 1 for row in rows)
    plot(rows, 40, tmp_path / "delay.png")
    assert Image.open(tmp_path / "delay.png").size == (900, 520)


def test_ways_are_compared_on_the_same_seeds_and_delays():
    def outcome(way: str, delay: int, seed: int, success: bool) -> dict[str, object]:
        return {"way": way, "delay": delay, "task": "line", "seed": seed, "success": success}

    rival = [outcome(RIVAL, 0, seed, seed < 2) for seed in range(4)]
    blended = [outcome("blend, 4", 0, seed, seed > 0) for seed in range(4)]
    (row,) = compare([*rival, *blended, outcome("blend, 4", 9, 0, True)])  # nobody else had a delay of 9
    assert (row["way"], row["pairs"], row["wins"], row["losses"]) == ("blend, 4", 4, 2, 1)
    assert row["difference"] == 0.25
    assert row["low"] < 0 < row["high"]
