"""What an environment is to sqap: seeded episodes that give `Observation`s and take actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sqap.observation import Observation


@dataclass(frozen=True)
class StepResult:
    """Outcome of one control step: the task's success flag, and whether time is up."""

    success: bool
    truncated: bool


class Environment(Protocol):
    """One task in one simulator. `step` does not render; `observe` does, when a policy wants to look."""

    task: str
    action_dim: int
    max_steps: int

    def reset(self, seed: int) -> Observation: ...

    def step(self, action: np.ndarray) -> StepResult: ...

    def observe(self) -> Observation: ...

    def close(self) -> None: ...
