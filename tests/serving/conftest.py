"""A server in a thread, at a free port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sqap import Policy
from sqap.serving.logs import logger
from sqap.serving.server import Server
from sqap.serving.settings import ServerSettings


class Running:
    """A server whose event loop runs in a thread."""

    def __init__(self, policy: Policy, settings: ServerSettings) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = Server(policy, settings)
        self.call(self.server.start())

    def call(self, work: Any, timeout: float = 60) -> Any:
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def close(self) -> None:
        self.call(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


StartServer = Callable[..., Running]


@pytest.fixture
def usual_log() -> Iterator[None]:
    """The log as it is before a command sets it up."""
    yield
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def start(policy: Policy) -> Iterator[StartServer]:
    """``start(policy=policy, **settings)``: a `Running` server, stopped when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(served: Policy = policy, **settings: Any) -> Running:
            running = Running(served, ServerSettings(**{"port": 0} | settings))
            stack.callback(running.close)
            return running

        yield make
