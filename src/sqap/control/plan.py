"""The actions that a control loop is about to execute, and what it does when there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sqap.errors import InputError


@dataclass(frozen=True, eq=False)
class Hold:
    """The action that keeps a robot where it is.

    Args:
        neutral: ``(action_dim,)``, what moves nothing: zeros for displacements.
        keep: dimensions that go on as they were last sent: a gripper's, or all of a controller's that takes
            positions.
    """

    neutral: np.ndarray
    keep: Sequence[int] = ()

    def __call__(self, last: np.ndarray | None) -> np.ndarray:
        """The action after ``last``, the one that was sent before; None if none was."""
        action = np.array(self.neutral, dtype=np.float32)
        if last is not None:
            action[list(self.keep)] = last[list(self.keep)]
        return action


@dataclass(frozen=True, eq=False)
class ActionLimits:
    """What a robot may be sent.

    Args:
        low: ``(action_dim,)``, least of each dimension.
        high: ``(action_dim,)``, largest of each dimension.
    """

    low: np.ndarray
    high: np.ndarray

    def problem(self, chunk: np.ndarray) -> str | None:
        """Why a chunk ``(horizon, action_dim)`` may not be sent; None if it may."""
        if chunk.ndim != 2 or chunk.shape[1] != len(self.low) or not len(chunk):
            return f"a chunk must be of shape (horizon, {len(self.low)}), got {chunk.shape}"
        if not np.isfinite(chunk).all():
            return "a chunk holds numbers that are not finite"
        beyond = np.argwhere((chunk < self.low) | (chunk > self.high))
        if len(beyond):
            step, dimension = beyond[0]
            return (
                f"dimension {dimension} of action {step} is {chunk[step, dimension]:g}, which must be from "
                f"{self.low[dimension]:g} to {self.high[dimension]:g}"
            )
        return None


class Plan:
    """The rest of the latest chunk.

    A chunk that comes late is for a robot that has gone on meanwhile: as many of its first actions are left
    out as were executed since its observation. A robot that held still has executed none.

    Args:
        execute: actions of a chunk after which the next one should take over; None for all that there are. If
            the next one is late, the rest of the chunk is executed.
        blend: actions over which a new chunk takes over from the rest of the old one, by a weight that rises
            evenly; 0 switches at once.

    Raises:
        InputError: ``execute`` is less than 1, or ``blend`` negative.
    """

    def __init__(self, execute: int | None = None, blend: int = 0) -> None:
        if execute is not None and execute < 1:
            raise InputError(f"execute must be at least 1, got {execute}")
        if blend < 0:
            raise InputError(f"blend must not be negative, got {blend}")
        self._execute, self._blend = execute, blend
        self._rows = np.zeros((0, 0), dtype=np.float32)
        self._since = 0  # actions executed since the chunk took over
        self._wanted = 0  # after which the next one should
        self.executed = 0  # actions in all
        self.horizon = 0  # actions of the latest chunk, with those that were left out

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def due(self) -> int:
        """Actions until the next chunk should take over."""
        return max(0, self._wanted - self._since)

    def take(self) -> np.ndarray | None:
        """The next action ``(action_dim,)``; None if there is none."""
        if not len(self._rows):
            return None
        action: np.ndarray = self._rows[0]
        self._rows = self._rows[1:]
        self._since, self.executed = self._since + 1, self.executed + 1
        return action

    def replace(self, chunk: np.ndarray, executed: int) -> bool:
        """Go on with a new chunk.

        Args:
            chunk: ``(horizon, action_dim)``.
            executed: what `executed` was when its observation was made.

        Returns:
            False if all of the chunk is for the past; the plan is then what it was.
        """
        fresh = np.array(chunk[self.executed - executed :], dtype=np.float32)
        if not len(fresh):
            return False
        if overlap := min(self._blend, len(self._rows), len(fresh)):
            weight = (np.arange(1, overlap + 1, dtype=np.float32) / (overlap + 1))[:, None]
            fresh[:overlap] = (1 - weight) * self._rows[:overlap] + weight * fresh[:overlap]
        self._rows, self._since, self.horizon = fresh, 0, len(chunk)
        self._wanted = len(fresh) if self._execute is None else min(self._execute, len(fresh))
        return True
