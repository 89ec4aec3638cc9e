"""What a process of an evaluation does: one policy, one episode after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

import sqap
from sqap import environments
from sqap.checkpoints import identify
from sqap.checkpoints.choices import Choices
from sqap.environments import Environment
from sqap.errors import SqapError
from sqap.evaluation.log import Record
from sqap.evaluation.rollout import Actor, run_episode
from sqap.evaluation.settings import Settings
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
    """

    path: str
    fingerprint: str
    settings: Settings
    choices: Choices = field(default_factory=Choices)
    load: Load = load_policy
    make: Make = environments.make


def start_worker(spec: WorkerSpec) -> Worker:
    """A process that answers (task, seed) with the `Record` of that episode."""
    return Worker(spec.path, _Session, spec)


class _Session:
    """The process's policy, and the environment of the latest task."""

    def __init__(self, spec: WorkerSpec) -> None:
        import torch

        torch.set_num_threads(spec.settings.threads)
        self._spec = spec
        self._policy = spec.load(spec.path, spec.choices, spec.fingerprint)
        self._env: Environment | None = None
        self._cold_calls = WARMUP_CALLS

    def __call__(self, request: tuple[str, int]) -> Record:
        task, seed = request
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
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Record(self._spec.fingerprint, settings, peak_rss_bytes(), episode, finished)

    def _environment(self, task: str) -> Environment:
        if self._env is None or self._env.task != task:
            # One at a time: episodes come task by task, and twelve simulators would dwarf the policy.
            if self._env is not None:
                self._env.close()
            self._env = self._spec.make(self._spec.settings.env, task)
        return self._env
