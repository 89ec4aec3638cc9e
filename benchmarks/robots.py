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
from websockets.asyncio.client import ClientConnection, connect

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


class Stamped(ClientConnection):
    """Knows when something last arrived, however many robots of this process are served before it is read."""

    arrived = 0.0

    def data_received(self, data: bytes) -> None:
        self.arrived = time.monotonic()
        super().data_received(data)


async def robot(url: str, observation: Observation, until: float, period: float, seen: Seen) -> None:
    """Ask until a time, every period or as often as it is answered."""
    frame = pack(write_request(observation))
    options: dict[str, Any] = {"compression": None, "max_size": None, "proxy": None, "open_timeout": 60}
    async with connect(url, create_connection=Stamped, **options) as connection:
        await connection.recv()  # the greeting
        await asyncio.sleep(period * random.random())
        due = time.monotonic()
        while (begin := time.monotonic()) < until:
            await connection.send(frame)
            reply = await connection.recv()
            if isinstance(reply, str):
                assert reply.startswith(REFUSED), reply
                seen.refusals += 1
                await asyncio.sleep(0.01)
                continue
            took, timing = 1e3 * (connection.arrived - begin), unpack(reply)["server_timing"]
            seen.round_trips.append(took)
            seen.overhead.append(timing["overhead_ms"])
            seen.beyond.append(took - timing["queue_ms"] - timing["infer_ms"])
            seen.infer.append(timing["infer_ms"])
            seen.batches.append(int(timing["batch"]))
            due = max(due + period, time.monotonic())
            if period:
                await asyncio.sleep(due - time.monotonic())


async def load(server: Server, observations: list[Observation], seconds: float, period: float) -> Seen:
    """All robots at once, while the server's memory is looked at."""
    seen, until = Seen(), time.monotonic() + seconds

    async def watch() -> None:
        for _ in range(SAMPLES):
            await asyncio.sleep(seconds / SAMPLES)
            seen.memory.append(server.resident)

    await asyncio.gather(watch(), *(robot(server.url, o, until, period, seen) for o in observations))
    return seen
