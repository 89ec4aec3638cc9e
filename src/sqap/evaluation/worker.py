"""What a process of an evaluation does: one policy, one episode after another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

import sqap
from sqap import environments
from sqap.checkpoints import identify
from sqap.checkpoints.choices import Choices
from sqap.environments import Environment
from sqap.errors import SqapError, one_line
from sqap.evaluation.log import Record
from sqap.evaluation.rollout import Actor, Episode, run_episode
from sqap.evaluation.settings import Settings
from sqap.kernels import cpu
from sqap.process import Worker, peak_rss_bytes

# The first calls of a process allocate and compile what later ones reuse. Nobody waits for them twice.
WARMUP_CALLS = 2

Load = Callable[[str, Choices, str], Actor]  # path, choices, fingerprint
Make = Callable[[str, str], Environment]


def load_policy(path: str, choices: Choices, fingerprint: str) -> Actor:
    """The policy at ``path``, as `sqap.load` gives it, with its weights in memory.

    Raises:
        SqapError: it cannot be loaded, or is not the one with this fingerprint.
    """
    policy = sqap.load(path, **vars(choices))
    policy.load_weights()
    if identify(policy) != fingerprint:  # asked last, so that it is of the files that were read
        raise SqapError(
            f"{path} is not what it was when the evaluation began; repeat the command to run what it is now"
        )
    actor: Actor = policy
    return actor


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker process needs to know.

    Args:
        path: where the policy is.
        fingerprint: what the policy is called in records.
        settings: of the evaluation.
        choices: by which the policy is loaded.
        load: builds the policy, having checked that it has the fingerprint; importable, as it is sent to the
            process by name.
        make: builds an environment from its name and a task; importable.
        keep_going: an episode that raises is a failed one, and its reason is kept; else the error goes on.
    """

    path: str
    fingerprint: str
    settings: Settings
    choices: Choices = field(default_factory=Choices)
    load: Load = load_policy
    make: Make = environments.make
    keep_going: bool = False

    def failed(self, task: str, seed: int, reason: str) -> Record:
        """The record of an episode that could not be run."""
        episode = Episode.failed(task, seed, one_line(reason))
        return Record(self.fingerprint, self.settings, peak_rss_bytes(), episode, _now(), cpu.processor())


def start_worker(spec: WorkerSpec) -> Worker:
    """A process that answers (task, seed) with the `Record` of that episode."""
    return Worker(spec.path, EpisodeRunner, spec)


class EpisodeRunner:
    """A policy in this process, and the environment of the latest task. Close it."""

    def __init__(self, spec: WorkerSpec) -> None:
        import torch

        torch.set_num_threads(spec.settings.threads)
        self.spec = spec
        self._policy = spec.load(spec.path, spec.choices, spec.fingerprint)
        self._env: Environment | None = None
        self._cold_calls = WARMUP_CALLS

    def __call__(self, request: tuple[str, int]) -> Record:
        task, seed = request
        env = self._environment(task)  # a simulator that is not there is no failed episode
        try:
            episode = self._run(env, seed)
        except Exception as problem:
            if not self.spec.keep_going:
                raise
            with suppress(Exception):  # a simulator that has raised may be in any state
                self.close()
            return self.spec.failed(task, seed, _reason(problem))
        cold = min(self._cold_calls, len(episode.latencies_ms))
        self._cold_calls -= cold
        episode = replace(episode, latencies_ms=episode.latencies_ms[cold:])
        spec = self.spec
        return Record(spec.fingerprint, spec.settings, peak_rss_bytes(), episode, _now(), cpu.processor())

    def close(self) -> None:
        """Close the environment; the next episode makes another."""
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def _run(self, env: Environment, seed: int) -> Episode:
        settings = self.spec.settings
        return run_episode(
            self._policy,
            env,
            seed,
            units=environments.action_units(settings.env),
            execute=settings.execute,
            ensemble=settings.ensemble,
        )

    def _environment(self, task: str) -> Environment:
        if self._env is None or self._env.task != task:
            # One at a time: episodes come task by task, and twelve simulators would dwarf the policy.
            self.close()
            self._env = self.spec.make(self.spec.settings.env, task)
        return self._env


def _reason(problem: Exception) -> str:
    """What an error says; of what is not sqap's own, also its kind."""
    said = str(problem)
    return said if isinstance(problem, SqapError) else f"{type(problem).__name__}: {said}".rstrip(": ")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
