"""Clients of the policy server: `AsyncPolicyClient`, and `PolicyClient` for whoever has no event loop."""

from __future__ import annotations

import asyncio
import random
import ssl
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.uri import parse_uri

from sqap.errors import InputError, SqapError
from sqap.observation import Observation
from sqap.policy import Step
from sqap.pruning.memory import Memory
from sqap.serving.requests import REFUSED, Refused, write_request
from sqap.serving.wire import pack, unpack

FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0  # seconds between two attempts to connect
MAX_REPLY_BYTES = 64 * 2**20
MOST_OBJECTS = 100_000  # maps, lists and their entries in a server's frame

T = TypeVar("T")


class Unreachable(SqapError):
    """The server did not answer in time, or there is none."""


class Rejected(SqapError):
    """The server would never act on this observation, or does not let this robot in; its own words."""


@dataclass(frozen=True, eq=False)
class Reply:
    """What the server answered.

    Args:
        actions: ``(horizon, action_dim)`` float32 in robot units.
        timing: the server's ``queue_ms``, ``infer_ms``, ``overhead_ms`` and their sum ``total_ms``, and how
            many robots were in the ``batch``.
        request_id: the observation's name in the server's log.
    """

    actions: np.ndarray
    timing: dict[str, float]
    request_id: str | None = None


class AsyncPolicyClient:
    """One robot's connection to a policy server in openpi's protocol.

    It connects when it is first used, and again when the connection broke, waiting longer between attempts. A
    new connection is a new episode for the server. Of several tasks that ask, one is served after the other.

    Args:
        host: name or address, or a whole ``ws://`` or ``wss://`` address.
        port: of the server; None where ``host`` has it.
        api_key: of the server, if it needs one.
        timeout: seconds that an answer may take, attempts to connect included.
        tls: for ``wss://``, where the system's certificates do not do.

    Raises:
        InputError: it is no address.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8000,
        *,
        api_key: str | None = None,
        timeout: float = 10.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        address = host if host.startswith(("ws://", "wss://")) else f"ws://{host}"
        self._url = address if port is None else f"{address}:{port}"
        try:
            parse_uri(self._url)
        except (InvalidURI, ValueError) as problem:
            raise InputError(f"{self._url} is no address of a server: {problem}") from problem
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._timeout, self._tls = timeout, tls
        self._connection: ClientConnection | None = None
        self._metadata: dict[str, Any] = {}
        self._owed = 0  # replies to observations that were given up
        self._reset = False
        self._why = ""  # there is no answer
        self._turn = asyncio.Lock()

    async def metadata(self) -> dict[str, Any]:
        """What the server says of its policy; see docs/serve.md.

        Raises:
            Unreachable: there is no server.
            Rejected: it does not let this robot in.
        """
        await self._within(self._greet())
        return self._metadata

    async def infer(
        self, observation: Observation, *, seed: int | None = None, deadline_s: float | None = None
    ) -> Reply:
        """The actions for an observation.

        Where the connection breaks before the answer is there, the observation is sent again.

        Args:
            observation: what the robot sees.
            seed: of the diffusion noise.
            deadline_s: seconds after which the server need not begin.

        Raises:
            Refused: the server does not act on this one, but may on the next.
            Rejected: the server would never act on it.
            Unreachable: there is no answer in time.
        """
        reset, self._reset = self._reset, False
        message = write_request(observation, seed=seed, reset=reset, deadline_s=deadline_s)
        try:
            found = await self._within(self._ask(pack(message)))
        except BaseException:
            self._reset = self._reset or reset
            raise
        return _reply(found)

    def reset(self) -> None:
        """A new episode begins with the next observation."""
        self._reset = True

    async def close(self) -> None:
        """Leave the server. Safe to call twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> AsyncPolicyClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(self, frame: bytes) -> dict[str, Any]:
        async with self._turn:
            for wait in _waits():
                connection = await self._connect()
                try:
                    return self._read(await self._exchange(connection, frame))
                except ConnectionClosed as problem:
                    self._connection, self._why = None, str(problem)
                await asyncio.sleep(wait)
            raise AssertionError("there is no last attempt")

    async def _greet(self) -> None:
        async with self._turn:
            await self._connect()

    async def _exchange(self, connection: ClientConnection, frame: bytes) -> str | bytes:
        """The reply to a frame; replies come in order, those that nobody waits for any more first."""
        self._owed += 1
        await connection.send(frame)
        while True:
            reply = await connection.recv()
            self._owed -= 1
            if not self._owed:
                return reply

    def _read(self, reply: str | bytes) -> dict[str, Any]:
        if isinstance(reply, bytes):
            return unpack(reply)
        if reply.startswith(REFUSED):
            raise Refused(reply.removeprefix(REFUSED))
        self._connection = None  # the server closes it
        raise Rejected(reply)

    async def _connect(self) -> ClientConnection:
        if self._connection is not None:
            return self._connection
        for wait in _waits():
            try:
                connection = await connect(
                    self._url,
                    additional_headers=self._headers,
                    compression=None,
                    max_size=MAX_REPLY_BYTES,
                    ssl=self._tls,
                    proxy=None,
                )
                greeting = await connection.recv()
            except InvalidStatus as problem:
                status, body = problem.response.status_code, problem.response.body or b""
                if status in (401, 403):
                    raise Rejected(
                        f"{self._url} answered {status}: {body.decode(errors='replace')}"
                    ) from None
                self._why = f"it answered {status}: {body.decode(errors='replace').strip()}"
            except (OSError, InvalidHandshake, ConnectionClosed, EOFError) as problem:
                self._why = str(problem) or type(problem).__name__
            else:
                self._connection, self._owed = connection, 0
                if isinstance(greeting, bytes):
                    self._metadata = unpack(greeting, containers=MOST_OBJECTS, entries=MOST_OBJECTS)
                return connection
            await asyncio.sleep(wait)
        raise AssertionError("there is no last attempt")

    async def _within(self, work: Coroutine[Any, Any, T]) -> T:
        self._why = "it did not answer"
        try:
            return await asyncio.wait_for(work, self._timeout)
        except asyncio.TimeoutError:
            raise Unreachable(f"no answer from {self._url} in {self._timeout:g} s: {self._why}") from None


class PolicyClient:
    """`AsyncPolicyClient` for programs without an event loop, and a drop-in for a policy in a rollout.

    The connection lives in a thread of its own, which answers the server's pings while nobody asks anything.
    Arguments are those of `AsyncPolicyClient`.
    """

    def __init__(self, host: str = "127.0.0.1", port: int | None = 8000, **options: Any) -> None:
        self._client = AsyncPolicyClient(host, port, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="policy client", daemon=True)
        self._thread.start()

    def metadata(self) -> dict[str, Any]:
        """As `AsyncPolicyClient.metadata`."""
        return self._wait(self._client.metadata())

    def infer(
        self, observation: Observation, *, seed: int | None = None, deadline_s: float | None = None
    ) -> Reply:
        """As `AsyncPolicyClient.infer`."""
        return self._wait(self._client.infer(observation, seed=seed, deadline_s=deadline_s))

    def step(
        self, observation: Observation, *, seed: int | None = None, memory: Memory | None = None
    ) -> Step:
        """As `sqap.Policy.step`, for whatever drives a policy; the selections stay with the server.

        Args:
            observation: what the robot sees.
            seed: of the diffusion noise.
            memory: None, since the server keeps it; `reset` makes it forget.
        """
        if memory is not None:
            raise InputError("the server keeps a robot's memory; call reset() where an episode begins")
        return Step(self.infer(observation, seed=seed).actions)

    def reset(self) -> None:
        """As `AsyncPolicyClient.reset`."""
        self._client.reset()

    def close(self) -> None:
        """Leave the server. Safe to call twice."""
        if not self._loop.is_closed():
            self._wait(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _waits() -> Iterator[float]:
    """Seconds before each further attempt, longer and longer, and never the same for a crowd of robots."""
    wait = FIRST_WAIT
    while True:
        yield wait * random.uniform(0.5, 1.0)
        wait = min(2 * wait, LONGEST_WAIT)


def _reply(found: dict[str, Any]) -> Reply:
    actions, timing, name = found.get("actions"), found.get("server_timing", {}), found.get("request_id")
    if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f":
        raise InputError("the server's answer has no array of actions (horizon, action_dim)")
    return Reply(actions, timing if isinstance(timing, dict) else {}, name if isinstance(name, str) else None)
