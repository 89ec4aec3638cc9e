"""Time and delays as a simulation has them, to test a control loop and to measure what a delay costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqap.policy import Step

_TINY = 1e-9  # seconds; sums of periods are not exact


class SimulatedClock:
    """A clock that goes on only where somebody sleeps."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@dataclass(frozen=True, eq=False)
class _Later:
    """A step that is there at a time of the clock."""

    clock: SimulatedClock
    ready: float
    work: Callable[[], Step]

    def done(self) -> bool:
        return self.clock.now() >= self.ready - _TINY

    def result(self) -> Step:
        return self.work()


@dataclass(frozen=True, eq=False)
class Delayed:
    """Computes steps as an executor, and gives them after a delay of simulated time.

    Args:
        clock: of the simulation.
        delay: seconds that the next step takes.
    """

    clock: SimulatedClock
    delay: Callable[[], float]

    def submit(self, work: Callable[[], Step], /) -> _Later:
        """The step is computed when it is asked for its result."""
        return _Later(self.clock, self.clock.now() + self.delay(), work)
