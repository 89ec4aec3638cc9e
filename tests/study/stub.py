"""A simulator that needs nothing but numpy; importing this registers it as ``stub``.

The policy sees noise. Whether an episode succeeds is decided by the second decimal of where the gripper ends:
policies that act a little differently succeed in different episodes, and the same one in the same.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from sqap import Camera, Observation, environments
from sqap.environments import ControlUnits, StepResult

CAMERA = "corner2"
TASKS = ("open", "close")
MAX_STEPS = 8  # as many as a chunk has
BROKEN: set[tuple[str, int]] = set()  # tasks and seeds that raise
PAUSE = 0.0  # seconds that a step takes


class Stub:
    """One task."""

    action_dim = 4
    max_steps = MAX_STEPS

    def __init__(self, task: str) -> None:
        self.task = task

    def reset(self, seed: int) -> Observation:
        self._seed, self._steps, self._place = seed, 0, np.zeros(3)
        direction = np.random.default_rng((seed, TASKS.index(self.task))).normal(size=3)
        self._direction = direction / np.linalg.norm(direction)
        return self.observe()

    def step(self, action: np.ndarray) -> StepResult:
        self._steps += 1
        time.sleep(PAUSE)
        if (self.task, self._seed) in BROKEN and self._steps > 3:
            raise RuntimeError("the solver diverged")
        self._place += np.clip(action[:3], -1, 1)
        over = self._steps >= self.max_steps
        hundredths = int(100 * abs(self._place @ self._direction))
        return StepResult(success=over and hundredths % 2 == 0, truncated=over)

    def observe(self) -> Observation:
        numbers = np.random.default_rng((self._seed, self._steps))
        image = numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return Observation(
            images={CAMERA: image},
            instruction=f"{self.task} the drawer",
            cameras={CAMERA: Camera(np.array([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]), np.eye(4))},
            end_effector=np.array([0.1, 0.0, 1.0]),
        )

    def close(self) -> None:
        pass


class Deadly(Stub):
    """Kills its process three times, in the second episode of ``close``."""

    def step(self, action: np.ndarray) -> StepResult:
        deaths = Path(os.environ["STUB_DEATHS"])
        if (self.task, self._seed) == ("close", 4_000_001) and len(deaths.read_text()) < 3:
            deaths.write_text(deaths.read_text() + "x")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def make_deadly(env: str, task: str) -> Deadly:
    """What stands for `sqap.environments.make` in worker processes."""
    return Deadly(task)


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Few replayed frames, and one thread, which is all that so small a policy can use."""
    patch.setattr("sqap.study.run.REPLAY_FRAMES", 4)
    patch.setattr("sqap.evaluation.settings.available_cores", lambda: 1)


environments._SUITES["stub"] = environments._Suite(
    make=Stub,
    tasks=TASKS,
    default_tasks=TASKS,
    units=ControlUnits(metres=0.01, hz=10.0, limit=1.0, gripper=3),
    describe=lambda: {"stub": "1"},
)
