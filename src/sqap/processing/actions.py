"""Action steps: what a model gives to what its robot is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sqap.errors import InputError
from sqap.processing.normalization import Clamp, MeanStd, Range


@dataclass(frozen=True)
class ActionUnits:
    """What an action's dimensions mean on the robot.

    ``translation`` names the dimensions that displace the gripper, by ``millimetres`` per unit; ``gripper``
    the one that opens and closes it, which changes its mind at ``gripper_threshold``.
    """

    translation: tuple[int, ...]
    millimetres: float
    gripper: int | None = None
    gripper_threshold: float = 0.0


@dataclass(frozen=True)
class Take:
    """The first ``width`` dimensions, where a model's actions are padded.

    Raises:
        InputError: the width is not positive.
    """

    width: int
    kind: Literal["take"] = "take"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"the width must be at least 1, got {self.width}")

    def unnormalize(self, values: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """``(horizon, dimensions)`` to ``(horizon, width)``."""
        return values[:, : self.width]

    def after(self, width: int) -> int:
        """Dimensions behind it.

        Raises:
            InputError: there are fewer.
        """
        if self.width > width:
            raise InputError(f"{self.width} dimensions cannot be taken of {width}")
        return self.width


@dataclass(frozen=True)
class Binarize:
    """Two values for each of ``dimensions`` (a gripper): ``high`` from the threshold on, ``low`` below.

    Which of them opens the gripper is the robot's convention; ``high`` may be less than ``low``.

    Raises:
        InputError: a dimension is negative or named twice.
    """

    dimensions: tuple[int, ...]
    threshold: float = 0.5
    low: float = 0.0
    high: float = 1.0
    kind: Literal["binarize"] = "binarize"

    def __post_init__(self) -> None:
        _check(self.dimensions)

    def unnormalize(self, values: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """Of actions ``(horizon, dimensions)``."""
        values = values.copy()
        for i in self.dimensions:
            values[:, i] = np.where(values[:, i] >= self.threshold, self.high, self.low)
        return values

    def after(self, width: int) -> int:
        """As many dimensions as before.

        Raises:
            InputError: one that it names is not there.
        """
        return _within(self.dimensions, width)


@dataclass(frozen=True)
class AddState:
    """Actions relative to the robot's state, in its own units, become absolute: pi0's deltas.

    Raises:
        InputError: a dimension is negative or named twice.
    """

    dimensions: tuple[int, ...]
    kind: Literal["add_state"] = "add_state"

    def __post_init__(self) -> None:
        _check(self.dimensions)

    def unnormalize(self, values: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """Of actions ``(horizon, dimensions)``.

        Raises:
            InputError: the observation has no state, or a shorter one.
        """
        if state is None:
            raise InputError("actions are relative to the robot's state, and the observation has none")
        _within(self.dimensions, len(state))
        values, chosen = values.copy(), list(self.dimensions)
        values[:, chosen] += state[chosen]
        return values

    def after(self, width: int) -> int:
        """As many dimensions as before.

        Raises:
            InputError: one that it names is not there.
        """
        return _within(self.dimensions, width)


ActionStep = Range | MeanStd | Clamp | Take | Binarize | AddState


def action_dim(steps: Sequence[ActionStep], width: int) -> int:
    """Dimensions of what the robot is told, where the model gives ``width``.

    Raises:
        InputError: the steps do not fit each other.
    """
    for step in steps:
        width = step.after(width)
    return width


def unnormalize(
    actions: np.ndarray, steps: Sequence[ActionStep], state: np.ndarray | None = None
) -> np.ndarray:
    """What the model gives, ``(horizon, action_dim)``, to robot units, float32.

    Args:
        actions: left as they are.
        steps: of the policy.
        state: the robot's, in its own units, where actions are relative to it.

    Raises:
        InputError: actions are relative to a state that is not there.
    """
    with np.errstate(all="ignore"):  # actions that are not finite are refused in the end
        for step in steps:
            actions = step.unnormalize(actions, state)
        return actions.astype(np.float32)


def action_bounds(steps: Sequence[ActionStep], width: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The least and the largest action ``(action_dim,)`` in robot units that a policy can give.

    Args:
        steps: of the policy.
        width: dimensions of what its model gives.

    Returns:
        None if the steps do not begin by clamping what the model gives, or add the robot's state to it.
    """
    if not steps or not isinstance(steps[0], Clamp) or any(isinstance(step, AddState) for step in steps):
        return None
    # The steps after the clamp are monotonic in each dimension.
    ends = unnormalize(np.stack([np.full(width, -1.0), np.full(width, 1.0)]), steps)
    return ends.min(axis=0), ends.max(axis=0)


def _check(dimensions: tuple[int, ...]) -> None:
    if len(set(dimensions)) != len(dimensions) or min(dimensions, default=0) < 0:
        raise InputError(f"dimensions must be different ones from 0 on, got {list(dimensions)}")


def _within(dimensions: tuple[int, ...], width: int) -> int:
    if max(dimensions, default=-1) >= width:
        raise InputError(f"dimensions must be below {width}, got {list(dimensions)}")
    return width
