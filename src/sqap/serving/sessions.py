"""What the server keeps of a connected robot, and the line in which robots wait for the policy."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from sqap.evaluation.ensemble import AdaptiveEnsemble
from sqap.pruning.memory import Memory
from sqap.serving.requests import Refused, Request
from sqap.serving.settings import Limits

BURST_SECONDS = 0.5

# A reply, or what went wrong: as a value, since the robot that is to hear of it may be gone.
Answer = dict[str, Any] | Exception


class Rate:
    """A token bucket: so many observations a second on average, `BURST_SECONDS` worth of them at once.

    Args:
        hz: observations a second.
        now: seconds of a monotonic clock.
    """

    def __init__(self, hz: float, now: float) -> None:
        self._hz, self._most, self._then = hz, max(1.0, BURST_SECONDS * hz), now
        self._tokens = self._most

    def take(self, now: float) -> None:
        """Count one observation.

        Raises:
            Refused: it comes too soon.
        """
        self._tokens = min(self._most, self._tokens + self._hz * (now - self._then))
        self._then = now
        if self._tokens < 1:
            raise Refused(f"more than {self._hz:g} observations a second came from this robot")
        self._tokens -= 1


@dataclass(eq=False)
class Session:
    """One connection, which is one robot, and what its step leaves to the next.

    Args:
        name: of the connection, unique in this server.
        peer: address of the robot.
        ensemble_size: chunks that are averaged, if they are.
        rate: of its observations.
    """

    name: str
    peer: str
    ensemble_size: int | None
    rate: Rate
    memory: Memory | None = None
    reset_due: bool = False  # an observation that was to begin an episode was not acted on
    over: bool = False  # nothing more is answered
    requests: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    unused_said: bool = False
    ensemble: AdaptiveEnsemble | None = field(init=False)

    def __post_init__(self) -> None:
        self.forget()

    def begin(self, reset: bool) -> None:
        """The policy is about to act on an observation, which begins an episode or does not."""
        if reset or self.reset_due:
            self.forget()

    def forget(self) -> None:
        """The next observation follows no other."""
        self.memory, self.reset_due = None, False
        self.skip(False)

    def skip(self, reset: bool) -> None:
        """An observation, which was to begin an episode or was not, is not acted on.

        Chunks before it do not tell the action after it, as their rows are for one step after the other.
        """
        self.reset_due = self.reset_due or reset
        self.ensemble = None if self.ensemble_size is None else AdaptiveEnsemble(self.ensemble_size)


@dataclass(eq=False)
class Job:
    """One observation on its way through the server. Times are seconds of `time.monotonic`.

    Args:
        session: whose it is.
        request: what is asked.
        name: request id, as logs and replies have it.
        arrived: when its frame was there.
        queued: when it had been read and began to wait.
        deadline: when it is too late.
        answer: what it comes to.
    """

    session: Session
    request: Request
    name: str
    arrived: float
    queued: float
    deadline: float | None
    answer: asyncio.Future[Answer]

    def finish(self, answer: Answer) -> None:
        """Answer, unless the robot is gone."""
        if not self.answer.done():
            self.answer.set_result(answer)

    def refuse(self, reason: str) -> None:
        """Answer that it is not acted on."""
        self.session.skip(self.request.reset)
        self.finish(Refused(reason))


class InLine(Protocol):
    """What the line looks at of a job."""

    @property
    def session(self) -> Hashable: ...

    @property
    def deadline(self) -> float | None: ...


W = TypeVar("W", bound=InLine)


class Line(Generic[W]):
    """Robots whose observation waits, in the order in which they came; each has one place.

    Args:
        limits: how many may wait, and how many are taken at once.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._jobs: dict[Hashable, W] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: W) -> W | None:
        """Let an observation wait. One that waits already for the same robot gives it its place.

        Returns:
            The one that gave way, if one did.

        Raises:
            Refused: too many robots wait.
        """
        before = self._jobs.get(job.session)
        if before is None and len(self._jobs) >= self._limits.waiting:
            raise Refused(f"{len(self._jobs)} robots wait already, as many as may")
        self._jobs[job.session] = job
        return before

    def take(self, now: float | None = None) -> tuple[list[W], list[W]]:
        """Those to act on next, and those before them that are too late."""
        now = time.monotonic() if now is None else now
        batch: list[W] = []
        late: list[W] = []
        for session, job in list(self._jobs.items()):
            if len(batch) == self._limits.batch:
                break
            del self._jobs[session]
            (late if job.deadline is not None and now > job.deadline else batch).append(job)
        return batch, late

    def drop(self, session: Hashable) -> W | None:
        """Forget what a robot that is gone waited for."""
        return self._jobs.pop(session, None)
