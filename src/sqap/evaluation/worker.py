"""What a process of an evaluation does: one policy, one episode after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import sqap
from sqap import environments
from sqap.environments import Environment
from sqap.evaluation.log import Record, Settings
from sqap.evaluation.rollout import Actor, run_episode
from sqap.process import Worker, peak_rss_bytes

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


def start_worker(spec: WorkerSpec) -> Worker:
    """A process that answers (task, seed) with the `Record` of that episode."""
    return Worker(spec.path, _Session, spec)


class _Session:
    """The process's policy, and the environment of the latest task."""

    def __init__(self, spec: WorkerSpec) -> None:
        import torch

        torch.set_num_threads(spec.settings.threads)
        self._spec = spec
        self._policy = spec.load(spec.path)
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
        return Record(self._spec.fingerprint, settings, peak_rss_bytes(), episode)

    def _environment(self, task: str) -> Environment:
        if self._env is None or self._env.task != task:
            # One at a time: episodes come task by task, and twelve simulators would dwarf the policy.
            if self._env is not None:
                self._env.close()
            self._env = self._spec.make(self._spec.settings.env, task)
        return self._env
