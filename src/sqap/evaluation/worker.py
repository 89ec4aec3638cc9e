"""One policy in a process of its own: its memory is its own, and two policies can take turns."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import sqap
from sqap import environments
from sqap.environments import Environment
from sqap.errors import SqapError
from sqap.evaluation.log import Record, Settings
from sqap.evaluation.rollout import Actor, run_episode

# The first calls of a process allocate and compile what later ones reuse. Nobody waits for them twice.
WARMUP_CALLS = 2

Load = Callable[[str], Actor]
Make = Callable[[str, str], Environment]


def load_policy(path: str) -> Actor:
    """The policy at ``path``, as `sqap.load` gives it."""
    policy: Actor = sqap.load(path)
    return policy


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker process needs to know.

    Args:
        path: where the policy is.
        fingerprint: what the policy is called in records.
        settings: of the evaluation.
        load: builds the policy from ``path``; importable, as it is sent to the process by name.
        make: builds an environment from its name and a task; importable.
    """

    path: str
    fingerprint: str
    settings: Settings
    load: Load = load_policy
    make: Make = environments.make


class PolicyWorker:
    """A spawned process that loads a policy and runs episodes on request, one at a time.

    The process starts at the first request, so that loading disturbs nobody's latencies.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    @property
    def pipe(self) -> Connection:
        """Readable, for `multiprocessing.connection.wait`, when the record is there."""
        assert self._pipe is not None, "nothing was requested yet"
        return self._pipe

    def request(self, task: str, seed: int) -> None:
        """Start one episode. `receive` must be called before the next request."""
        if self._process is None:
            self._start()
        # A process that is gone already said why, or left a closed pipe: both are for `receive`.
        with contextlib.suppress(OSError):
            self.pipe.send((task, seed))

    def receive(self) -> Record:
        """Wait for the episode that was requested.

        Raises:
            SqapError: what went wrong in the process, in its own words, or that it died.
            RuntimeError: the process met a bug; the message holds its trace.
        """
        try:
            reply = self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            assert self._process is not None
            self._process.join()
            raise SqapError(
                f"the process that ran {self._spec.path} ended with exit code {self._process.exitcode} "
                "(-9 usually means that memory ran out)"
            ) from error
        if isinstance(reply, Exception):
            raise reply
        assert isinstance(reply, Record)
        return reply

    def close(self) -> None:
        """End the process, whatever it does. Safe to call twice."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._spec), daemon=True)
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


def _serve(pipe: Connection, spec: WorkerSpec) -> None:
    """Answer requests until the parent hangs up; an error is an answer too, and the last."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        session = _Session(spec)
        for task, seed in _requests(pipe):
            record = session.run(task, seed)
            with contextlib.suppress(BrokenPipeError):
                pipe.send(record)
    except SqapError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"the process that ran {spec.path} failed:\n{traceback.format_exc()}"))


def _requests(pipe: Connection) -> Iterator[tuple[str, int]]:
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        yield request


class _Session:
    """The process's policy, and the environment of the latest task."""

    def __init__(self, spec: WorkerSpec) -> None:
        import torch

        torch.set_num_threads(spec.settings.threads)
        self._spec = spec
        self._policy = spec.load(spec.path)
        self._env: Environment | None = None
        self._cold_calls = WARMUP_CALLS

    def run(self, task: str, seed: int) -> Record:
        settings = self._spec.settings
        episode = run_episode(
            self._policy,
            self._environment(task),
            seed,
            units=environments.action_units(settings.env),
            execute=settings.execute,
            ensemble=settings.ensemble,
        )
        cold = min(self._cold_calls, len(episode.latencies_ms))
        self._cold_calls -= cold
        episode = replace(episode, latencies_ms=episode.latencies_ms[cold:])
        return Record(self._spec.fingerprint, settings, peak_rss_bytes(), episode)

    def _environment(self, task: str) -> Environment:
        if self._env is None or self._env.task != task:
            # One at a time: episodes come task by task, and twelve simulators would dwarf the policy.
            if self._env is not None:
                self._env.close()
            self._env = self._spec.make(self._spec.settings.env, task)
        return self._env


def peak_rss_bytes() -> int:
    """Largest resident memory this process ever had, in bytes."""
    # Not getrusage on Linux: a child's value there starts from its parent's.
    with contextlib.suppress(OSError):
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if peak is not None:
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
