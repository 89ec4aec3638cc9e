"""The control loop: one action every period, whatever the policy does."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sqap.control.plan import ActionLimits, Hold, Plan
from sqap.errors import InputError, one_line
from sqap.evaluation.rollout import Actor, noise_seed
from sqap.kernels.cpu import release_threads
from sqap.observation import Observation
from sqap.policy import Step
from sqap.pruning.memory import Memory

RECENT = 8  # delays by which the next is foreseen
FAULTS = 1000  # of which a report tells
BLEND = 3  # smoother than switching, and as successful: docs/serve.md


class Robot(Protocol):
    """What is controlled. Every method should return in much less than a period."""

    def observe(self) -> Observation:
        """What it sees now."""

    def apply(self, action: np.ndarray) -> None:
        """Execute an action ``(action_dim,)`` in the period that begins."""

    def stop(self) -> None:
        """Come to rest, safely: no further action comes."""


class Clock(Protocol):
    """Where the loop has its time from, in seconds."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class Pending(Protocol):
    """A step that is computed elsewhere, as a `concurrent.futures.Future`."""

    def done(self) -> bool: ...

    def result(self) -> Step: ...


class Executor(Protocol):
    """Where steps are computed, one at a time, while the loop goes on."""

    def submit(self, work: Callable[[], Step], /) -> Pending: ...


class SystemClock:
    """The system's monotonic clock, which does not jump."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Fault:
    """What went wrong, at which period of the loop."""

    tick: int
    what: str


@dataclass
class Report:
    """What came of a run.

    Args:
        ticks: periods.
        executed: in which an action of the policy was sent.
        held: in which the robot was held where it is.
        chunks: that took over.
        delays: periods from observations to their chunks, of the latest; without the first, which warms up.
        overruns: periods that began late by a period or more.
        faults: the latest.
        counts: of faults by kind: "refused" chunks, "failed" steps, "obsolete" chunks, "late" for gaps.
        stopped: why the robot was stopped; None if the run ended as it should.
    """

    ticks: int = 0
    executed: int = 0
    held: int = 0
    chunks: int = 0
    delays: deque[int] = field(default_factory=lambda: deque(maxlen=FAULTS))
    overruns: int = 0
    faults: deque[Fault] = field(default_factory=lambda: deque(maxlen=FAULTS))
    counts: Counter[str] = field(default_factory=Counter)
    stopped: str | None = None


@dataclass(eq=False)
class _Asked:
    """A step that was asked for."""

    pending: Pending
    tick: int
    executed: int


class Loop:
    """Executes a policy's chunks at a fixed rate. The next chunk is computed while the last is executed.

    An observation is made so early that its chunk is there when it is due, by the longest of the last
    `RECENT` delays. Where no action is left because the policy is late, fails, or gives what the robot may
    not be sent, the robot is held, and stopped if that lasts. A run is one episode.

    Args:
        actor: a `sqap.Policy`, a `sqap.serving.PolicyClient`, or anything with their `step`.
        robot: what is controlled.
        rate_hz: actions a second.
        limits: a chunk that is not within them is refused as a whole.
        hold: what a robot without an action is sent; None stops it instead.
        stop_after_s: seconds of holding after which the robot is stopped; None holds for ever. The wait for
            the first chunk does not count.
        execute: as in `Plan`.
        blend: as in `Plan`.
        seed: of the episode's diffusion noise; None draws one.
        clock: of the loop.
        executor: where the policy computes; a thread of its own if None.

    Raises:
        InputError: the rate is not positive, or a setting of `Plan` is out of range.
    """

    def __init__(
        self,
        actor: Actor,
        robot: Robot,
        rate_hz: float,
        *,
        limits: ActionLimits,
        hold: Hold | None,
        stop_after_s: float | None = None,
        execute: int | None = None,
        blend: int = BLEND,
        seed: int | None = None,
        clock: Clock | None = None,
        executor: Executor | None = None,
    ) -> None:
        if not rate_hz > 0:
            raise InputError(f"the rate must be positive, got {rate_hz}")
        self._actor, self._robot, self._period = actor, robot, 1 / rate_hz
        self._limits, self._hold, self._stop_after = limits, hold, stop_after_s
        self._seed, self._clock, self._executor = seed, clock or SystemClock(), executor
        self._settings = execute, blend
        self._begin()

    def _begin(self) -> None:
        self.report = Report()
        self._plan = Plan(*self._settings)
        self._memory: Memory | None = None
        self._asked: _Asked | None = None
        self._calls = 0
        self._first: int | None = None  # delay of the first step
        self._last: np.ndarray | None = None
        self._gap: float | None = None  # when the robot was first held

    def run(self, ticks: int | None = None, until: Callable[[], bool] = lambda: False) -> Report:
        """Control the robot, one episode.

        Args:
            ticks: periods; None for no end.
            until: asked before every period whether the run is over.

        Returns:
            `report`. If an exception leaves, of the robot for instance, the robot was told to stop.
        """
        self._begin()
        begin_episode(self._actor)
        own = None
        if self._executor is None:
            own = self._executor = ThreadPoolExecutor(1, thread_name_prefix="policy")
            release_threads()  # of this thread, which may have used the policy
        try:
            return self._run(ticks, until)
        except BaseException:
            self._robot.stop()
            raise
        finally:
            if own is not None:
                self._executor = None
                own.shutdown(wait=False, cancel_futures=True)

    def _run(self, ticks: int | None, until: Callable[[], bool]) -> Report:
        report, due = self.report, self._clock.now()
        while (ticks is None or report.ticks < ticks) and not until():
            self._collect()
            if self._asked is None and self._must_ask():
                self._ask()
                self._collect()
            action = self._next()
            if report.stopped is not None:
                self._robot.stop()
                break
            if action is not None:
                self._robot.apply(action)
                self._last = action
            report.ticks += 1
            due = self._wait(due + self._period)
        return report

    def _wait(self, due: float) -> float:
        """Sleep until the next period, which begins now if the last one took too long."""
        now = self._clock.now()
        if now - due >= self._period:
            self.report.overruns += 1
            return now
        if due > now:
            self._clock.sleep(due - now)
        return due

    def _must_ask(self) -> bool:
        """Whether the next step has to begin now, by the periods that it will take.

        One that takes as long as its chunk lasts begins when no action is left: if actions were executed
        meanwhile, nothing would be left of its chunk.
        """
        recent = list(self.report.delays)[-RECENT:]
        if recent and max(recent) >= self._plan.horizon:
            return not len(self._plan)
        return self._plan.due <= max(recent, default=self._first or 0)

    def _ask(self) -> None:
        observation, memory, call = self._robot.observe(), self._memory, self._calls
        seed = None if self._seed is None else noise_seed(self._seed, call)
        assert self._executor is not None
        pending = self._executor.submit(lambda: self._actor.step(observation, seed=seed, memory=memory))
        self._asked, self._calls = _Asked(pending, self.report.ticks, self._plan.executed), call + 1

    def _collect(self) -> None:
        """Go on with the chunk that was asked for, if it is there."""
        asked = self._asked
        if asked is None or not asked.pending.done():
            return
        self._asked = None
        try:
            step = asked.pending.result()
        except Exception as problem:  # whatever it is, the robot must go on being controlled
            self._fault("failed", f"{type(problem).__name__}: {problem}")
            return
        delay = self.report.ticks - asked.tick
        if self._first is None:
            self._first = delay
        else:
            self.report.delays.append(delay)
        if (why := self._limits.problem(step.chunk)) is not None:
            self._fault("refused", why)
        elif self._plan.replace(step.chunk, asked.executed):
            self._memory = step.memory
            self.report.chunks += 1
        else:
            self._fault("obsolete", f"a chunk of {len(step.chunk)} actions took {delay} periods")

    def _next(self) -> np.ndarray | None:
        """The action of this period; None if nothing is to be sent."""
        action = self._plan.take()
        if action is not None:
            self._gap = None
            self.report.executed += 1
            return action
        now, waiting = self._clock.now(), self.report.chunks == 0
        if self._gap is None:
            self._gap = now
            if not waiting:
                self._fault("late", "no action is left and the next chunk is not there")
        if not waiting:
            self.report.stopped = self._why_stop(now - self._gap)
        if self.report.stopped is not None or self._hold is None:
            return None
        self.report.held += 1
        return self._hold(self._last)

    def _why_stop(self, seconds: float) -> str | None:
        """Why a robot that has had no action for so long is stopped, if it is."""
        if self._hold is None:
            return "the policy is late, and there is nothing to hold the robot with"
        if self._stop_after is not None and seconds >= self._stop_after:
            return f"the policy gave no action for {seconds:.2f} s"
        return None

    def _fault(self, kind: str, what: str) -> None:
        self.report.counts[kind] += 1
        self.report.faults.append(Fault(self.report.ticks, one_line(f"{kind}: {what}")))


def begin_episode(actor: Actor) -> None:
    """Make a server forget the robot's last episode; a policy in this process keeps none."""
    reset = getattr(actor, "reset", None)
    if reset is not None:
        reset()
