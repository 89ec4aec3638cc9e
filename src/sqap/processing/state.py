"""State steps: the robot's state to the numbers that a policy reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.processing.normalization import Clamp, MeanStd, Range


@dataclass(frozen=True)
class Pad:
    """Zeros behind the numbers, up to ``width``."""

    width: int
    kind: Literal["pad"] = "pad"

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """``(dimensions,)`` to ``(width,)``."""
        return np.pad(values, (0, self.width - len(values)))

    def after(self, width: int) -> int:
        """Dimensions behind it.

        Raises:
            InputError: there are more already.
        """
        if width > self.width:
            raise InputError(f"{width} numbers cannot be padded to {self.width}")
        return self.width


StateStep = Range | MeanStd | Clamp | Pad


def state_dim(steps: Sequence[StateStep], width: int) -> int:
    """Numbers of the robot's state: as many as there are statistics of, or the model's ``width``."""
    return next((step.width for step in steps if isinstance(step, Range | MeanStd)), width)


def normalize_state(state: np.ndarray, steps: Sequence[StateStep]) -> Tensor:
    """The robot's state ``(dimensions,)`` to what the policy reads, ``(1, proprio_dim)``.

    Raises:
        InputError: the state is of another length.
    """
    wanted = state_dim(steps, len(state))
    if len(state) != wanted:
        raise InputError(f"the policy reads a state of {wanted} numbers, got {len(state)}")
    with np.errstate(all="ignore"):  # actions that are not finite are refused in the end
        for step in steps:
            step.after(len(state))
            state = step.normalize(state)
        return torch.from_numpy(state.astype(np.float32))[None]
