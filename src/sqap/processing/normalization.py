"""Steps that states and actions share: normalised numbers to a robot's and back, per dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sqap.errors import InputError


class _PerDimension:
    """A step with statistics of each dimension."""

    @property
    def width(self) -> int:
        """Dimensions."""
        raise NotImplementedError

    def after(self, width: int) -> int:
        """Dimensions behind it.

        Raises:
            InputError: it is not for so many.
        """
        if self.width != width:
            raise InputError(f"its statistics are of {self.width} dimensions, for {width}")
        return width


@dataclass(frozen=True)
class Range(_PerDimension):
    """``low`` and ``high`` are what -1 and 1 stand for, as the training data's percentiles or extremes.

    Args:
        low: per dimension.
        high: per dimension.
        mask: where it is false, numbers stay as they are.
        epsilon: added to the range that a robot's numbers are divided by, which may be 0.

    Raises:
        InputError: their lengths differ, or epsilon is negative.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]
    epsilon: float = 1e-8
    kind: Literal["range"] = "range"

    def __post_init__(self) -> None:
        lengths = len(self.low), len(self.high), len(self.mask)
        if len(set(lengths)) > 1:
            raise InputError("low, high and mask must have one length, got {}, {} and {}".format(*lengths))
        _check_epsilon(self.epsilon)

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """A robot's numbers ``(..., dimensions)`` to normalised ones: ``2 (x - low) / (high - low) - 1``."""
        low, high = np.array(self.low), np.array(self.high)
        scaled = 2 * (values - low) / (high - low + self.epsilon) - 1
        return np.where(self.mask, scaled, values)

    def unnormalize(self, values: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Normalised numbers to a robot's: ``0.5 (y + 1)(high - low) + low``."""
        low, high = np.array(self.low), np.array(self.high)
        return np.where(self.mask, 0.5 * (values + 1) * (high - low) + low, values)

    @property
    def width(self) -> int:
        """Dimensions."""
        return len(self.low)


@dataclass(frozen=True)
class MeanStd(_PerDimension):
    """Numbers by their training data's mean and deviation.

    Args:
        mean: per dimension.
        std: per dimension.
        epsilon: added to the deviation that a robot's numbers are divided by, which may be 0.

    Raises:
        InputError: their lengths differ, or epsilon is negative.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    epsilon: float = 1e-8
    kind: Literal["mean_std"] = "mean_std"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise InputError(f"mean and std must have one length, got {len(self.mean)} and {len(self.std)}")
        _check_epsilon(self.epsilon)

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """A robot's numbers ``(..., dimensions)`` to normalised ones."""
        normalized: np.ndarray = (values - np.array(self.mean)) / (np.array(self.std) + self.epsilon)
        return normalized

    def unnormalize(self, values: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Normalised numbers to a robot's."""
        found: np.ndarray = values * np.array(self.std) + np.array(self.mean)
        return found

    @property
    def width(self) -> int:
        """Dimensions."""
        return len(self.mean)


@dataclass(frozen=True)
class Clamp:
    """Cuts normalised numbers to [-1, 1]."""

    kind: Literal["clamp"] = "clamp"

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Of a state, behind its statistics."""
        clipped: np.ndarray = np.clip(values, -1.0, 1.0)
        return clipped

    def unnormalize(self, values: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Of actions, before their statistics."""
        return self.normalize(values)

    def after(self, width: int) -> int:
        """As many dimensions as before."""
        return width


def _check_epsilon(epsilon: float) -> None:
    if epsilon < 0:
        raise InputError(f"epsilon must not be negative, got {epsilon}")
