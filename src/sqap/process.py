"""Work in a process of its own, which has its own memory and can take turns with others."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sqap.errors import SqapError

Answer = Callable[[Any], Any]
GRACE_SECONDS = 10  # for a process to leave in good order
KEPT_BYTES, LARGE_BYTES = 256 * 2**20, 32 * 2**20  # of `keep_freed_memory`; glibc takes no larger LARGE_BYTES


class WorkerDied(SqapError):
    """A process ended without an answer: it was killed, or ran out of memory."""


class Worker:
    """A spawned process that answers requests, one at a time.

    It starts at the first request, so that loading disturbs nobody's latencies.

    Args:
        name: of what it works with, for messages.
        make: gets ``spec`` in the process and returns what answers requests there; importable, as it is sent
            by name.
        spec: anything that can be pickled.
    """

    def __init__(self, name: str, make: Callable[[Any], Answer], spec: Any) -> None:
        self._name, self._make, self._spec = name, make, spec
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    @property
    def pipe(self) -> Connection:
        """Readable, for `multiprocessing.connection.wait`, when the answer is there."""
        assert self._pipe is not None, "nothing was requested yet"
        return self._pipe

    def request(self, message: Any) -> None:
        """Ask something. `receive` must be called before the next request."""
        if self._process is None:
            self._start()
        # A process that is gone already said why, or left a closed pipe: both are for `receive`.
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def receive(self) -> Any:
        """Wait for the answer.

        Raises:
            WorkerDied: the process ended without an answer.
            SqapError: what went wrong in the process, in its own words.
            RuntimeError: the process met a bug; the message holds its trace.
        """
        try:
            reply = self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            assert self._process is not None
            self._process.join()
            raise WorkerDied(
                f"the process that ran {self._name} ended with exit code {self._process.exitcode} "
                "(-9 usually means that memory ran out)"
            ) from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """End the process, whatever it does. Safe to call twice."""
        if self._process is not None:
            # It leaves in good order, and gives back what its libraries hold. It is told again and again: a
            # signal that comes right before a system call does not interrupt it.
            for _ in range(GRACE_SECONDS):
                self._process.terminate()
                self._process.join(1)
                if self._process.exitcode is not None:
                    break
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._name, self._make, self._spec)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        with _interrupts_blocked():
            process.start()
            self._process = process
        theirs.close()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    # A new process inherits the mask, so Ctrl-C cannot surprise it among its imports. It reaches every
    # process of the terminal, but only the parent is to answer.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    sys.exit(0)


def _serve(pipe: Connection, name: str, make: Callable[[Any], Answer], spec: Any) -> None:
    """Answer requests until the parent hangs up; an error is an answer too, and the last."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    try:
        answer = make(spec)
        for request in _requests(pipe):
            reply = answer(request)
            with contextlib.suppress(BrokenPipeError):
                pipe.send(reply)
    except SqapError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"the process that ran {name} failed:\n{traceback.format_exc()}"))


def _requests(pipe: Connection) -> Iterator[Any]:
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        yield request


def peak_rss_bytes() -> int:
    """Largest resident memory this process ever had, in bytes."""
    # Not getrusage on Linux: a child's value there starts from its parent's.
    with contextlib.suppress(OSError):
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        if peak is not None:
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Count `peak_rss_bytes` from here on, where the system can (Linux)."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def keep_freed_memory() -> None:
    """Keep what is freed for what is allocated next, where the allocator can (glibc).

    By default, it returns a step's buffers to the system, which maps them again page by page in the next
    step. Up to `KEPT_BYTES` stay with each heap. A buffer larger than `LARGE_BYTES` is returned as before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of <malloc.h>
        mallopt(trim_threshold, KEPT_BYTES)
        mallopt(mmap_threshold, LARGE_BYTES)


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
