"""The protocol behind whatever listens: robots' connections in, a policy's answers out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from websockets.exceptions import ConnectionClosed

from sqap.errors import InputError, SqapError
from sqap.kernels.cpu import release_threads
from sqap.policy import Policy, Step
from sqap.serving.engine import Done, Engine
from sqap.serving.http import Http
from sqap.serving.live import Live
from sqap.serving.logs import event
from sqap.serving.metadata import metadata
from sqap.serving.metrics import Metrics
from sqap.serving.pages import peer
from sqap.serving.requests import REFUSED, Refused, read_request
from sqap.serving.sessions import Answer, Job, Line, Rate, Session
from sqap.serving.settings import ServerSettings
from sqap.serving.wire import pack, unpack

READ_AHEAD = 8  # observations of one robot that are not answered yet
STALLED_SECONDS = 60.0  # a step that takes longer than this makes the server not ready
INTERNAL_ERROR, GOING_AWAY = 1011, 1001  # WebSocket close codes

Answers = asyncio.Queue["asyncio.Future[Answer]"]


class Connection(Protocol):
    """A robot's WebSocket behind its handshake; a `ServerConnection` of websockets is one.

    Iterating gives its frames until it is closed; `send` then raises ``ConnectionClosed``.
    """

    @property
    def remote_address(self) -> Any: ...

    @property
    def close_code(self) -> int | None: ...

    @property
    def close_reason(self) -> str | None: ...

    def __aiter__(self) -> AsyncIterator[str | bytes]: ...

    async def send(self, message: str | bytes, /) -> None: ...

    async def close(self, code: int, reason: str, /) -> None: ...


class Service:
    """One policy for many robots, from `start` to `stop`.

    Args:
        policy: what acts.
        settings: to whom, and how much.
        name: begins the names of its connections, where several services share a log.

    Attributes:
        live: the robots that are connected, and what the page shows of them.
        line: the robots that wait.
        http: answers all requests but robots' handshakes.
        draining: nothing more is taken.
    """

    def __init__(self, policy: Policy, settings: ServerSettings, name: str = "") -> None:
        self._policy, self.settings, self._name = policy, settings, name
        self.live = Live(policy)
        self.line = Line[Job](settings.limits)
        self._engine = Engine(policy, self.line, self._too_late, self._acted)
        self._metrics = Metrics(
            lambda: len(self.line), lambda: len(self.live.robots), lambda: self.not_ready() is None
        )
        self._names = itertools.count(1)
        self.draining = False
        self._work: asyncio.Task[None] | None = None
        self.http = Http(settings, policy.config.family, self.live, self.line, self._metrics, self.not_ready)

    async def start(self) -> None:
        """Warm the policy up, then compute whatever waits.

        Raises:
            SqapError: the policy cannot act, or has no ensemble of the size in the settings.
        """
        check_ensemble(self._policy, self.settings)
        release_threads()  # of the event loop's thread, which may have used the policy
        began = time.monotonic()
        await self._engine.warm_up()
        event(logging.INFO, "warm", seconds=round(time.monotonic() - began, 3))
        self._greeting = pack(metadata(self._policy, self.settings))
        self._work = asyncio.create_task(self._engine.run())
        self._work.add_done_callback(_say_end)

    def not_ready(self) -> str | None:
        """Why observations are not taken now; None if they are."""
        return "the server is shutting down" if self.draining else self.broken()

    def broken(self) -> str | None:
        """Why nothing is computed any more; None if it is."""
        if self._work is None or self._work.done():
            return "nothing computes; the server's log says why"
        began = self._engine.began
        if began is not None and time.monotonic() - began > STALLED_SECONDS:
            return f"the policy has not answered for {time.monotonic() - began:.0f} s"
        return None

    def too_many(self) -> None:
        """Count a connection that is dropped because too many are there."""
        self._metrics.too_many()

    async def drain(self) -> None:
        """Take nothing more, and return when what waits is answered, or has waited as long as it may."""
        self.draining = True
        event(logging.INFO, "draining", waiting=len(self.line))
        until = time.monotonic() + self.settings.drain_s
        while not self._engine.idle and time.monotonic() < until:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)  # answers are handed to their connections

    def stop(self) -> None:
        """Compute nothing more."""
        if self._work is not None:
            self._work.cancel()
        self._engine.close()
        event(logging.INFO, "stopped", robots=len(self.live.robots))

    async def robot(self, connection: Connection) -> None:
        """One robot's connection, from its handshake to its end."""
        rate = Rate(self.settings.limits.rate_hz, time.monotonic())
        session = Session(
            f"{self._name}c{next(self._names)}", peer(connection.remote_address), self.settings.ensemble, rate
        )
        self.live.connect(session.name, session.peer)
        self._metrics.connections.labels("robot").inc()
        event(logging.INFO, "connected", connection=session.name, peer=session.peer)
        answers: Answers = asyncio.Queue(READ_AHEAD)
        writer = asyncio.create_task(self._write(connection, session, answers))
        try:
            await connection.send(self._greeting)
            async for frame in connection:
                if not session.over:
                    await answers.put(self._submit(session, frame))
        except ConnectionClosed:
            pass
        finally:
            session.over = True
            writer.cancel()
            if (job := self.line.drop(session)) is not None:
                job.answer.cancel()
                self._metrics.answers.labels("robot gone").inc()
            self.live.disconnect(session.name)
            event(
                logging.INFO,
                "disconnected",
                connection=session.name,
                code=connection.close_code,
                reason=connection.close_reason or None,
            )

    def _submit(self, session: Session, frame: str | bytes) -> asyncio.Future[Answer]:
        """Let a frame's observation wait for the policy; what it comes to, which may be known at once."""
        arrived = time.monotonic()
        name = f"{session.name}-{next(session.requests)}"
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        request = None
        try:
            if isinstance(frame, str):
                raise InputError("an observation must be a binary frame, got a text frame")
            request = read_request(unpack(frame), self.settings.limits)
            session.rate.take(arrived)
            if (why := self.not_ready()) is not None:
                raise Refused(why)
            seconds = request.deadline_s or self.settings.deadline_s
            deadline = None if seconds is None else arrived + seconds
            job = Job(session, request, name, arrived, time.monotonic(), deadline, answer)
            self._say_unused(job)
            before = self.line.put(job)
        except SqapError as problem:
            session.skip(request is not None and request.reset)
            answer.set_result(problem)
            self._count_refusal(name, problem)
            return answer
        if before is not None:
            self._refuse(
                before, "superseded", "a newer observation of this robot came before it was acted on"
            )
        self._engine.wake()
        return answer

    async def _write(self, connection: Connection, session: Session, answers: Answers) -> None:
        """Send a robot's answers in the order of its observations; the first that is an error is the last."""
        try:
            while True:
                answer = await (await answers.get())
                if isinstance(answer, dict):
                    await connection.send(pack(answer))
                    continue
                await connection.send(_sentence(answer))
                if not isinstance(answer, Refused):
                    session.over = True
                    await connection.close(INTERNAL_ERROR, _close_reason(answer))
                    return
        except ConnectionClosed:
            return
        finally:
            session.over = True
            while not answers.empty():  # the reader may wait for a place
                answers.get_nowait()

    def _too_late(self, job: Job) -> None:
        waited = 1e3 * (time.monotonic() - job.arrived)
        self._refuse(job, "late", f"the observation waited {waited:.0f} ms, longer than its deadline")

    def _refuse(self, job: Job, outcome: str, why: str) -> None:
        job.refuse(why)
        self._metrics.answers.labels(outcome).inc()
        event(logging.DEBUG, outcome, request=job.name)

    def _count_refusal(self, name: str, problem: SqapError) -> None:
        outcome = "refused" if isinstance(problem, Refused) else "invalid"
        self._metrics.answers.labels(outcome).inc()
        level = logging.DEBUG if outcome == "refused" else logging.WARNING
        event(level, outcome, request=name, why=str(problem))

    def _acted(self, done: Done) -> None:
        """Hand a step's outcomes to their robots."""
        self._metrics.step_seconds.observe(done.ended - done.began)
        self._metrics.batch.observe(len(done.jobs))
        for job, outcome in zip(done.jobs, done.outcomes, strict=True):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                reply = self._reply(job, outcome, done)
            except Exception as problem:
                self._failed(job, problem)
                continue
            job.finish(reply)

    def _reply(self, job: Job, step: Step, done: Done) -> dict[str, Any]:
        session, now = job.session, time.monotonic()
        session.memory = step.memory
        actions = step.chunk if session.ensemble is None else session.ensemble.add(step.chunk)[None]
        total, waited, computed = now - job.arrived, done.waited(job), done.ended - done.began
        timing: dict[str, float] = {
            "queue_ms": 1e3 * waited,
            "infer_ms": 1e3 * computed,
            "overhead_ms": 1e3 * (total - waited - computed),
            "total_ms": 1e3 * total,
            "batch": len(done.jobs),
        }
        self._metrics.answers.labels("acted").inc()
        self._metrics.queue_seconds.observe(waited)
        self._metrics.overhead_seconds.observe(total - waited - computed)
        self._metrics.answer_seconds.observe(total)
        self.live.acted(session.name, job.request.reset, job.request.observation, step, timing)
        event(logging.DEBUG, "acted", request=job.name, timing=timing)
        return {"actions": actions, "server_timing": timing, "request_id": job.name}

    def _failed(self, job: Job, problem: Exception) -> None:
        known = isinstance(problem, SqapError)
        self._metrics.answers.labels("invalid" if known else "failed").inc()
        level = logging.WARNING if known else logging.CRITICAL
        event(level, "failed", request=job.name, problem=problem)
        job.finish(problem)

    def _say_unused(self, job: Job) -> None:
        config, seen = self._policy.config, job.request.observation
        unused = [name for name in seen.images if name not in config.cameras]
        if seen.state is not None and not config.state_dim:
            unused.append("state")
        if unused and not job.session.unused_said:
            job.session.unused_said = True
            event(logging.WARNING, "unused", connection=job.session.name, keys=unused)


def check_ensemble(policy: Policy, settings: ServerSettings) -> None:
    """Refuse an ensemble of more chunks than a chunk has actions.

    Raises:
        InputError: it is of more.
    """
    horizon = policy.config.model.head.horizon
    if settings.ensemble is not None and settings.ensemble > horizon:
        raise InputError(
            f"an ensemble can be of up to {horizon} chunks, the actions in one of this policy's chunks, "
            f"got {settings.ensemble}"
        )


def _say_end(work: asyncio.Task[None]) -> None:
    if not work.cancelled() and (problem := work.exception()) is not None:
        event(logging.CRITICAL, "the policy's task ended", problem=problem)


def _sentence(problem: Exception) -> str:
    """What a robot is told of an error: all of a user's mistake, nothing of what a bug has inside."""
    if isinstance(problem, Refused):
        return f"{REFUSED}{problem}"
    if isinstance(problem, SqapError):
        return str(problem)
    return f"the server met a bug ({type(problem).__name__}); its log has the details under this request"


def _close_reason(problem: Exception) -> str:
    """As much of the sentence as a close frame holds, which is 123 bytes."""
    return _sentence(problem).encode()[:120].decode(errors="ignore")
