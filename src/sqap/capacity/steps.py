"""How long a policy's step takes for one robot and for several: measured, or read from a file."""

from __future__ import annotations

import bisect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sqap.errors import InputError
from sqap.policy import Policy
from sqap.serving.engine import noise, warm_up

SIZES = (1, 2, 4, 8, 16)  # robots in the steps that are measured
CHANCES = 200  # that a mean is taken over


@dataclass(frozen=True)
class StepTimes:
    """Measured seconds of steps, by how many robots they were for.

    Args:
        seconds: robots in a step to what such steps took.

    Raises:
        InputError: there are none for one robot, or one is not a positive number.
    """

    seconds: Mapping[int, Sequence[float]]
    _sizes: list[int] = field(init=False, repr=False, compare=False)
    _sorted: dict[int, list[float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.seconds.get(1):
            raise InputError("the step times have none of a step for one robot")
        for size, values in self.seconds.items():
            if size < 1 or not values or not all(math.isfinite(v) and v > 0 for v in values):
                raise InputError(
                    f"the times of a step for {size} robots must be positive numbers, some of them"
                )
        object.__setattr__(self, "_sizes", sorted(self.seconds))
        object.__setattr__(self, "_sorted", {size: sorted(self.seconds[size]) for size in self._sizes})

    def draw(self, robots: int, chance: float) -> float:
        """Seconds of a step for so many robots: one of those measured, which ``chance`` in [0, 1) chooses.

        Between two sizes that were measured it is interpolated; beyond the largest it grows in proportion.
        """
        if robots in self._sorted:
            return self._at(robots, chance)
        if robots > self._sizes[-1]:
            return self._at(self._sizes[-1], chance) * robots / self._sizes[-1]
        above = bisect.bisect(self._sizes, robots)
        low, high = self._sizes[above - 1], self._sizes[above]
        share = (robots - low) / (high - low)
        return (1 - share) * self._at(low, chance) + share * self._at(high, chance)

    def mean(self, robots: int) -> float:
        """Mean seconds of a step for so many robots."""
        chances = (np.arange(CHANCES) + 0.5) / CHANCES
        return float(np.mean([self.draw(robots, chance) for chance in chances]))

    def to_json(self) -> dict[str, list[float]]:
        """Milliseconds by the number of robots, as `read_times` reads them."""
        return {str(size): [round(1e3 * v, 3) for v in self.seconds[size]] for size in self._sizes}

    def _at(self, size: int, chance: float) -> float:
        values = self._sorted[size]
        return values[int(chance * len(values))]


def measure(
    policy: Policy,
    sizes: Sequence[int] = SIZES,
    *,
    rounds: int = 30,
    warmups: int = 2,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StepTimes:
    """Time `Policy.steps` for each size, in turns, so that what disturbs this machine meets all of them.

    Args:
        policy: which acts on noise.
        sizes: robots in a step.
        rounds: steps of each size that are timed.
        warmups: rounds before these.
        threads: of PyTorch and the kernels; as they are if None.
        progress: gets (steps done, steps in all).
    """
    if threads is not None:
        torch.set_num_threads(threads)
    warm_up(policy)
    observations = [noise(policy, seed) for seed in range(max(sizes))]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    total = (warmups + rounds) * len(sizes)
    for turn in range(warmups + rounds):
        for place, size in enumerate(sizes):
            begin = time.perf_counter()
            policy.steps(observations[:size], seeds=range(size))
            if turn >= warmups:
                seconds[size].append(time.perf_counter() - begin)
            if progress is not None:
                progress(turn * len(sizes) + place + 1, total)
    return StepTimes(seconds)


def read_times(path: Path) -> tuple[StepTimes, str | None]:
    """The step times in a file that ``sqap capacity --json`` or ``sqap bench --json`` wrote.

    Returns:
        The times, and what of them was not measured, if something was not.

    Raises:
        InputError: it is neither, or cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"cannot read step times from {path}: {problem}") from problem
    try:
        if found.get("step_ms"):
            return StepTimes({int(n): [v / 1e3 for v in ms] for n, ms in found["step_ms"].items()}), None
        if found.get("candidates"):
            note = f"{path} has steps for one robot; a step for N robots is taken to last N times as long"
            return StepTimes({1: [v / 1e3 for v in found["candidates"]["sqap"]["step_ms"]]}), note
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        if isinstance(problem, InputError):
            raise InputError(f"{path}: {problem}") from problem
        raise InputError(
            f"{path} is not as `sqap capacity --json` or `sqap bench --json` writes it: {problem!r}"
        ) from problem
    raise InputError(f"{path} has no step times; `sqap capacity --json` and `sqap bench --json` write some")
