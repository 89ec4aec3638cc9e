"""A server in the foreground, until a signal tells it to stop."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqap.policy import Policy
from sqap.process import keep_freed_memory
from sqap.serving.server import Server
from sqap.serving.settings import ServerSettings

# Python lets a thread that computes keep the interpreter for 5 ms at a time, for which robots would wait.
SWITCH_SECONDS = 0.0005


def run(policy: Policy, settings: ServerSettings, started: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGTERM or SIGINT, then answer what waits and return.

    Args:
        policy: what acts.
        settings: of the server.
        started: called with the address when it listens.

    Raises:
        InputError: as `Server.start`.
    """
    set_up_process()
    asyncio.run(_run(Server(policy, settings), started))


def set_up_process() -> None:
    """Settings of a process that does nothing but serve a policy."""
    sys.setswitchinterval(SWITCH_SECONDS)
    keep_freed_memory()


async def _run(server: Server, started: Callable[[str], None]) -> None:
    with signals() as told:
        await server.start()
        with _uncollected():
            started(server.url)
            await told.wait()
    await server.stop()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Leave what there is now, all of PyTorch's objects, out of garbage collection: robots wait for it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets. Behind it, either ends the process at once, as ever."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    try:
        yield told
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
