"""What an environment is to sqap: seeded episodes that give `Observation`s and take actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sqap.observation import Observation


@dataclass(frozen=True)
class ControlUnits:
    """What the numbers in an action mean.

    Args:
        metres: displacement of the gripper's target in one control step, per unit of the first three entries;
            None if it is not known.
        hz: control steps per second.
        limit: the environment clips entries to [-limit, limit].
        gripper: the entry whose sign opens or closes the gripper; None if there is none.
    """

    metres: float | None = 1.0
    hz: float = 1.0
    limit: float = float("inf")
    gripper: int | None = None


@dataclass(frozen=True)
class StepResult:
    """Outcome of one control step: the task's success flag, and whether time is up."""

    success: bool
    truncated: bool


class Environment(Protocol):
    """One task in one simulator. `step` need not render; `observe` does, when a policy wants to look.

    Attributes:
        task: its name.
        max_steps: control steps of an episode.
    """

    task: str
    max_steps: int

    @property
    def action_dim(self) -> int | None:
        """Numbers of an action; None where the simulator does not say it beforehand."""

    def reset(self, seed: int) -> Observation: ...

    def step(self, action: np.ndarray) -> StepResult: ...

    def observe(self) -> Observation: ...

    def close(self) -> None: ...
