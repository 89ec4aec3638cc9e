"""Robots and the servers that they ask, as discrete events (SimPy).

A server is modelled as it is (`sqap.serving.engine`), with its own `sqap.serving.sessions.Line`: one thread
computes, and takes all that wait, up to the batch limit; a robot's newer observation takes the place of its
older one; an observation past its deadline is dropped; a full line refuses. Robots are divided evenly among
the replicas and stay with theirs. Times of steps are drawn from those that were measured, each on its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import simpy

from sqap.capacity.steps import StepTimes
from sqap.errors import InputError
from sqap.serving.requests import Refused
from sqap.serving.sessions import Line
from sqap.serving.settings import Limits

Events = Generator[simpy.Event, Any, Any]
Outcome = Literal["acted", "superseded", "refused", "late"]

RETRY_SECONDS = 0.01  # a robot that was refused waits at least as long


@dataclass(frozen=True)
class Load:
    """What the robots do.

    Args:
        robots: of all replicas.
        rate_hz: observations a second of each.
        poisson: observations come at random times instead of in equal periods.
        waits: a robot sends nothing while it waits for an answer; otherwise it keeps its rate.
        network_s: from a robot to the server and back; each way takes a random 0.5 to 1.5 times its half.
        deadline_s: after which an observation that still waits is dropped.

    Raises:
        InputError: a number is out of range.
    """

    robots: int
    rate_hz: float
    poisson: bool = False
    waits: bool = True
    network_s: float = 0.0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("robots", "rate_hz"):
            if not 0 < getattr(self, name) < np.inf:
                raise InputError(f"{name} must be a positive number, got {getattr(self, name)}")
        if not 0 <= self.network_s < np.inf:
            raise InputError(f"network_s must be zero or more, got {self.network_s}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise InputError(f"deadline_s must be positive, got {self.deadline_s}")


@dataclass
class Tally:
    """What became of the observations that were sent after the warm-up.

    Args:
        latencies: seconds from sending to the answer, of those that were acted on.
        outcomes: how many came to what.
        busy: seconds that the replicas computed.
        batches: robots in each step.
    """

    latencies: list[float] = field(default_factory=list)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    busy: float = 0.0
    batches: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Asked:
    """An observation at the server; what `Line` needs of a job."""

    session: int
    deadline: float | None
    outcome: simpy.Event


def simulate(
    load: Load, times: StepTimes, limits: Limits, replicas: int, seconds: float, warm_up: float, seed: object
) -> Tally:
    """One run, until every observation is answered.

    Args:
        load: the robots.
        times: of the policy's steps.
        limits: of each replica; ``batch`` and ``waiting`` count.
        replicas: among which the robots are divided.
        seconds: that the robots send for, after the warm-up.
        warm_up: seconds before, of which nothing is counted.
        seed: of everything that is drawn.
    """
    run = _Run(load, times, warm_up, warm_up + seconds, np.random.default_rng(seed))  # type: ignore[arg-type]
    servers = [_Server(run, limits) for _ in range(replicas)]
    for robot in range(load.robots):
        run.env.process(_robot(run, servers[robot % replicas], robot))
    run.env.run()
    return run.tally


class _Run:
    """What the processes of one run share."""

    def __init__(
        self, load: Load, times: StepTimes, begin: float, end: float, rng: np.random.Generator
    ) -> None:
        self.load, self.times, self.begin, self.end, self.rng = load, times, begin, end, rng
        self.env, self.tally = simpy.Environment(), Tally()
        self.unanswered = 0  # observations that count

    def step(self, robots: int) -> float:
        """Seconds of the step that begins now, which is counted."""
        seconds = self.times.draw(robots, self.rng.random())
        now = self.env.now
        self.tally.busy += max(0.0, min(now + seconds, self.end) - max(now, self.begin))
        if self.begin <= now < self.end:
            self.tally.batches.append(robots)
        return seconds

    def gap(self) -> float:
        """Seconds between two observations of a robot."""
        period = 1 / self.load.rate_hz
        return float(self.rng.exponential(period)) if self.load.poisson else period

    def way(self) -> simpy.Event:
        """Half of the network's round trip."""
        return self.env.timeout(self.load.network_s / 2 * (0.5 + self.rng.random()))


class _Server:
    """One replica."""

    def __init__(self, run: _Run, limits: Limits) -> None:
        self._run = run
        self._line = Line[_Asked](limits)
        self._more = run.env.event()
        run.env.process(self._compute())

    def ask(self, robot: int) -> simpy.Event:
        """Let a robot's observation wait; the event has its outcome."""
        env, deadline = self._run.env, self._run.load.deadline_s
        asked = _Asked(robot, None if deadline is None else env.now + deadline, env.event())
        try:
            before = self._line.put(asked)
        except Refused:
            return asked.outcome.succeed("refused")
        if before is not None:
            before.outcome.succeed("superseded")
        if not self._more.triggered:
            self._more.succeed()
        return asked.outcome

    def _compute(self) -> Events:
        env = self._run.env
        while True:
            yield self._more
            batch, late = self._line.take(env.now)
            if not len(self._line):
                self._more = env.event()
            for asked in late:
                asked.outcome.succeed("late")
            if batch:
                yield env.timeout(self._run.step(len(batch)))
                for asked in batch:
                    asked.outcome.succeed("acted")


def _robot(run: _Run, server: _Server, robot: int) -> Events:
    """Ask again and again, until the run ends and all that counts is answered."""
    env = run.env
    yield env.timeout(run.rng.random() / run.load.rate_hz)
    while env.now < run.end or run.unanswered:
        due = env.now + run.gap()
        asked = env.process(_ask(run, server, robot))
        if run.load.waits:
            outcome = yield asked
            due = max(due, env.now + (0.0 if outcome == "acted" else RETRY_SECONDS))
        yield env.timeout(due - env.now)


def _ask(run: _Run, server: _Server, robot: int) -> Events:
    """One observation on its way to the server, and its answer on the way back."""
    sent = run.env.now
    counts = run.begin <= sent < run.end
    run.unanswered += counts
    yield run.way()
    outcome: Outcome = yield server.ask(robot)
    yield run.way()
    run.unanswered -= counts
    if counts:
        run.tally.outcomes[outcome] += 1
        if outcome == "acted":
            run.tally.latencies.append(run.env.now - sent)
    return outcome
