"""Robots, requests and policies that tests of the server share."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from websockets.sync.client import ClientConnection, connect

from sqap import Observation, Policy
from sqap.serving.requests import write_request
from sqap.serving.wire import pack, unpack

KEY = "0123456789abcdef"


def robot(running: Any) -> ClientConnection:
    """A connection that has read its greeting."""
    connection = connect(running.url, compression=None, max_size=None)
    connection.recv(5)
    return connection


def ask(connection: ClientConnection, observation: Observation, **more: Any) -> dict[str, Any]:
    """The answer to an observation."""
    connection.send(pack(write_request(observation, **more)))
    answer = connection.recv(10)
    assert isinstance(answer, bytes), answer
    return unpack(answer)


def get(
    running: Any, path: str, authorization: str | None = None, host: str | None = None
) -> tuple[int, str]:
    """Status and text of an HTTP request."""
    return get_at(running.url, path, authorization, host)


def get_at(url: str, path: str, authorization: str | None = None, host: str | None = None) -> tuple[int, str]:
    """As `get`, of a server that is known by its address."""
    connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=15)
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    connection.request("GET", path, headers=headers | ({} if host is None else {"Host": host}))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process, and its address once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sqap", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    killer = threading.Timer(300, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at ws" in line, process.communicate()[1]
        yield process, line.split()[-1]
    finally:
        killer.cancel()
        process.kill()
        process.wait()


class Gate:
    """A policy whose steps wait while it is shut, so that a test decides what arrives meanwhile."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._opened, self._inside = threading.Event(), threading.Event()
        self._opened.set()
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)  # warming up calls the policy's own `step`

    def steps(self, observations: Any, **given: Any) -> Any:
        self.batches.append(len(observations))
        self._inside.set()
        assert self._opened.wait(30)
        return self._policy.steps(observations, **given)

    def shut(self) -> None:
        self._inside.clear()
        self._opened.clear()

    def open(self) -> None:
        self._opened.set()

    def wait_for_step(self) -> None:
        assert self._inside.wait(10)

    def wait_for_line(self, running: Any, waiting: int) -> None:
        until = time.monotonic() + 10
        while len(running.server.service.line) < waiting:
            assert time.monotonic() < until
            time.sleep(0.002)
