"""Simulated robots and the server that they load, for serve_load.py and capacity_check.py."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.uri import WebSocketURI, parse_uri

import sqap
from sqap.observation import Observation
from sqap.policy import Policy, Step
from sqap.process import keep_freed_memory
from sqap.serving import Limits, ServerSettings, run
from sqap.serving.engine import noise, warm_up
from sqap.serving.requests import REFUSED, write_request
from sqap.serving.wire import pack, unpack

SAMPLES = 40  # of the server's memory in a run
ALONE = 30  # steps before there are robots


class Null:
    """A policy that answers at once, with zeros."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._step = Step(policy.step(noise(policy)).chunk * 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def steps(self, observations: list[Observation], **_: Any) -> list[Step]:
        return [self._step] * len(observations)


@dataclass(frozen=True)
class Candidate:
    """What is loaded: a policy or `Null` in its place, and how many robots a step is for at most."""

    name: str
    batch: int
    null: bool = False


@dataclass
class Seen:
    """What the robots of one run have measured, in milliseconds."""

    round_trips: list[float] = field(default_factory=list)
    beyond: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)
    infer: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # of the server, in bytes
    refusals: int = 0
    processor_ms: float = 0.0  # of the server
    own_processor_ms: float = 0.0  # of the robots

    def add(self, took: float, timing: dict[str, Any]) -> None:
        """A round trip, and what the server tells of it."""
        self.round_trips.append(took)
        self.overhead.append(timing["overhead_ms"])
        self.beyond.append(took - timing["queue_ms"] - timing["infer_ms"])
        self.infer.append(timing["infer_ms"])
        self.batches.append(int(timing["batch"]))


def serve(source: str, candidate: Candidate, robots: int, threads: int, pipe: Connection) -> None:
    """The server's process; it sends what a step takes alone, and then its address."""
    import torch

    torch.set_num_threads(threads)
    policy: Any = sqap.load(source)
    keep_freed_memory()  # as `run` does
    with ThreadPoolExecutor(1) as thread:
        pipe.send(0.0 if candidate.null else thread.submit(alone, policy).result())
    limits = Limits(connections=robots + 8, rate_hz=1e6, waiting=max(64, robots), batch=candidate.batch)
    run(Null(policy) if candidate.null else policy, ServerSettings(port=0, limits=limits), pipe.send)


def alone(policy: Policy) -> float:
    """Median milliseconds of a step for one robot, in a thread as the server's."""
    warm_up(policy)
    observation, taken = noise(policy), []
    for _ in range(ALONE):
        begin = time.monotonic()
        policy.step(observation)
        taken.append(1e3 * (time.monotonic() - begin))
    return float(np.median(taken))


class Server:
    """A server's process and its address."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(*arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.alone_ms: float = ours.recv()
        self.url: str = ours.recv()

    @property
    def resident(self) -> int:
        """Bytes in memory."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def processor_ms(self) -> float:
        """Processor time of all its threads."""
        fields = (
            Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        )
        return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGTERM)
        self._process.join(20)
        self._process.kill()


@dataclass(frozen=True)
class Times:
    """When robots ask, in seconds; ``since`` and ``until`` of `time.monotonic`.

    Args:
        since: from when on what they see is noted.
        until: when they ask for the last time.
        period: from one observation to the next; 0 for as soon as there is an answer.
    """

    since: float
    until: float
    period: float


class Robot(asyncio.Protocol):
    """One robot, which asks for actions until its time is over.

    All robots share a process, and often the server's cores. So nothing stands between a socket and the
    protocol of websockets, and a reply is stamped before anything is done about it.
    """

    def __init__(self, address: WebSocketURI, frame: bytes, times: Times, seen: Seen) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._protocol = ClientProtocol(address, max_size=None)
        self._frame, self._times, self._seen = frame, times, seen
        self._due = self._begin = 0.0
        self._greeted = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._protocol.send_request(self._protocol.connect())
        self._flush()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode in (Opcode.BINARY, Opcode.TEXT):
                self._received(event, now)
        self._flush()  # answers to pings

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or ConnectionError(f"closed: {self._protocol.close_reason}"))

    def _received(self, frame: Frame, now: float) -> None:
        if not self._greeted:
            self._greeted = True
            self._due = now + self._times.period * random.random()
        elif frame.opcode is Opcode.TEXT:
            reply = bytes(frame.data).decode()
            assert reply.startswith(REFUSED), reply
            self._seen.refusals += self._begin >= self._times.since
            self._due = now + 0.01
        else:
            if self._begin >= self._times.since:
                self._seen.add(1e3 * (now - self._begin), unpack(bytes(frame.data))["server_timing"])
            self._due = max(self._due + self._times.period, now)
        if (wait := self._due - time.monotonic()) > 0:
            self._loop.call_later(wait, self._ask)
        else:
            self._ask()

    def _ask(self) -> None:
        if (begin := time.monotonic()) < self._times.until:
            self._begin = begin
            self._protocol.send_binary(self._frame)
            self._flush()
        elif not self.ended.done():
            self.ended.set_result(None)
            self._transport.close()

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            self._transport.write(data)


async def robot(url: str, observation: Observation, times: Times, seen: Seen) -> None:
    """Ask until it is time."""
    frame = pack(write_request(observation))
    address = parse_uri(url)
    _, one = await asyncio.get_running_loop().create_connection(
        lambda: Robot(address, frame, times, seen), address.host, address.port
    )
    await one.ended


async def load(
    server: Server, observations: list[Observation], seconds: float, period: float, warm_up: float = 0.0
) -> Seen:
    """All robots at once, while the server's memory is looked at.

    They begin together, which makes a crowd that no later time has: nothing is noted for ``warm_up`` seconds.
    """
    seen, since = Seen(), time.monotonic() + warm_up
    times = Times(since, since + seconds, period)

    async def watch() -> None:
        await asyncio.sleep(warm_up)
        server_ms, own_ms = server.processor_ms, 1e3 * time.process_time()
        for _ in range(SAMPLES):
            await asyncio.sleep(seconds / SAMPLES)
            seen.memory.append(server.resident)
        seen.processor_ms = server.processor_ms - server_ms
        seen.own_processor_ms = 1e3 * time.process_time() - own_ms

    await asyncio.gather(watch(), *(robot(server.url, o, times, seen) for o in observations))
    return seen
