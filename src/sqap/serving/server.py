"""The policy server: openpi's protocol for robots, and HTTP for people and their tools, at one port."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from typing import Any

from websockets.asyncio.server import Server as Listener
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from sqap.errors import InputError, SqapError
from sqap.files import reason
from sqap.policy import Policy, Step
from sqap.serving.engine import Done, Engine
from sqap.serving.http import Http, limited_connection, peer
from sqap.serving.live import Live
from sqap.serving.logs import event, logger
from sqap.serving.metadata import metadata
from sqap.serving.metrics import Metrics
from sqap.serving.requests import REFUSED, Refused, read_request
from sqap.serving.sessions import Answer, Job, Line, Rate, Session
from sqap.serving.settings import ServerSettings
from sqap.serving.wire import pack, unpack

PING_SECONDS = 20.0  # a robot that does not answer a ping for as long is gone
OPEN_SECONDS = 10.0  # for a handshake
LINGER_SECONDS = 1.0  # for the last answers to leave
READ_AHEAD = 8  # observations of one robot that are not answered yet
STALLED_SECONDS = 60.0  # a step that takes longer than this makes the server not ready
INTERNAL_ERROR, GOING_AWAY = 1011, 1001  # WebSocket close codes

Answers = asyncio.Queue["asyncio.Future[Answer]"]


class Server:
    """Serves one policy to many robots until `stop`.

    Args:
        policy: what acts.
        settings: where, to whom and how much.

    Attributes:
        url: where robots connect, once it is started.
    """

    url: str

    def __init__(self, policy: Policy, settings: ServerSettings) -> None:
        self._policy, self.settings = policy, settings
        self._live = Live(policy)
        self._line = Line(settings.limits)
        self._engine = Engine(policy, self._line, self._too_late, self._acted)
        self._metrics = Metrics(
            lambda: len(self._line), lambda: len(self._live.robots), lambda: self.not_ready() is None
        )
        self._names = itertools.count(1)
        self._draining = False
        self._listener: Listener | None = None
        self._work: asyncio.Task[None] | None = None
        self._http = Http(
            settings, policy.config.family, self._live, self._line, self._metrics, self.not_ready
        )

    async def start(self) -> None:
        """Warm the policy up, then listen.

        Raises:
            InputError: the address cannot be listened on, or the TLS files cannot be used.
            SqapError: the policy cannot act.
        """
        settings, limits = self.settings, self.settings.limits
        horizon = self._policy.config.model.head.horizon
        if settings.ensemble is not None and settings.ensemble > horizon:
            raise InputError(
                f"an ensemble can be of up to {horizon} chunks, the actions in one of this policy's chunks, "
                f"got {settings.ensemble}"
            )
        tls = settings.tls_context()
        began = time.monotonic()
        await self._engine.warm_up()
        event(logging.INFO, "warm", seconds=round(time.monotonic() - began, 3))
        self._greeting = pack(metadata(self._policy, settings))
        self._work = asyncio.create_task(self._engine.run())
        self._work.add_done_callback(_say_end)
        try:
            self._listener = await serve(
                self._robot,
                settings.host,
                settings.port,
                process_request=self._http.answer,
                ssl=tls,
                origins=[None],  # browsers name theirs, robots have none
                compression=None,
                max_size=limits.message_bytes,
                max_queue=1,
                open_timeout=OPEN_SECONDS,
                ping_interval=PING_SECONDS,
                ping_timeout=PING_SECONDS,
                close_timeout=LINGER_SECONDS,
                server_header=None,
                create_connection=limited_connection(2 * limits.connections, self._metrics.too_many),
                logger=logger.getChild("websockets"),
            )
        except OSError as problem:
            await self.stop()
            raise InputError(
                f"cannot listen on {settings.host} port {settings.port}: {reason(problem)}"
            ) from problem
        host, port = self._listener.sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        self.url = f"{'ws' if tls is None else 'wss'}://{host}:{port}"
        event(logging.INFO, "listening", url=self.url, key=settings.key is not None, tls=tls is not None)

    def not_ready(self) -> str | None:
        """Why observations are not taken now; None if they are."""
        if self._draining:
            return "the server is shutting down"
        if self._work is None or self._work.done():
            return "nothing computes; the server's log says why"
        began = self._engine.began
        if began is not None and time.monotonic() - began > STALLED_SECONDS:
            return f"the policy has not answered for {time.monotonic() - began:.0f} s"
        return None

    async def stop(self) -> None:
        """Take nothing more, answer what waits, then close every connection."""
        self._draining = True
        event(logging.INFO, "draining", waiting=len(self._line))
        if self._listener is not None:
            self._listener.close(close_connections=False)
            until = time.monotonic() + self.settings.drain_s
            while not self._engine.idle and time.monotonic() < until:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0)  # answers are handed to their connections
            await self._close_connections(self._listener)
        if self._work is not None:
            self._work.cancel()
        self._engine.close()
        event(logging.INFO, "stopped", robots=len(self._live.robots))

    async def _close_connections(self, listener: Listener) -> None:
        closing = [
            asyncio.create_task(connection.close(GOING_AWAY, "the server is shutting down"))
            for connection in listener.connections
        ]
        if closing:
            await asyncio.wait(closing, timeout=LINGER_SECONDS)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(listener.wait_closed(), LINGER_SECONDS)

    async def _robot(self, connection: ServerConnection) -> None:
        """One robot's connection, from its handshake to its end."""
        rate = Rate(self.settings.limits.rate_hz, time.monotonic())
        session = Session(f"c{next(self._names)}", peer(connection), self.settings.ensemble, rate)
        self._live.connect(session.name, session.peer)
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
            if (job := self._line.drop(session)) is not None:
                job.answer.cancel()
                self._metrics.answers.labels("robot gone").inc()
            self._live.disconnect(session.name)
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
            job = Job(session, request, name, arrived, None if seconds is None else arrived + seconds, answer)
            self._say_unused(job)
            before = self._line.put(job)
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

    async def _write(self, connection: ServerConnection, session: Session, answers: Answers) -> None:
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
        self._metrics.step_seconds.observe(done.seconds)
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
        timing: dict[str, float] = {
            "queue_ms": 1e3 * (done.began - job.arrived),
            "infer_ms": 1e3 * done.seconds,
            "total_ms": 1e3 * (now - job.arrived),
            "batch": len(done.jobs),
        }
        self._metrics.answers.labels("acted").inc()
        self._metrics.queue_seconds.observe(done.began - job.arrived)
        self._metrics.answer_seconds.observe(now - job.arrived)
        self._live.acted(session.name, job.request.reset, job.request.observation, step, timing)
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
