"""Many episodes of one or more policies: paired, interleaved, in separate processes, resumable."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqap import environments
from sqap.checkpoints.choices import Choices
from sqap.errors import InputError
from sqap.evaluation.lanes import Job, run_in_processes
from sqap.evaluation.log import EpisodeLog, Record
from sqap.evaluation.rollout import make_ensemble
from sqap.evaluation.settings import current_settings
from sqap.evaluation.worker import Load, Make, WorkerSpec, load_policy

Progress = Callable[[Record, int, int], None]
# Runs jobs for the policies, so many at a time.
Executor = Callable[[Sequence[WorkerSpec], Sequence[Job], int], Generator[Record, None, None]]


@dataclass(frozen=True)
class Run:
    """All episodes of one policy.

    Args:
        policy: as the caller named it.
        env: name of the environment.
        seed: of each task's first episode.
        records: task by task in the order asked for, seeds ascending.
        from_log: those of the records that were in the log already.
    """

    policy: str
    env: str
    seed: int
    records: tuple[Record, ...]
    from_log: tuple[Record, ...] = ()


def evaluate(
    policies: Sequence[str | Path],
    env: str,
    tasks: Sequence[str],
    episodes: int,
    seed: int,
    *,
    fingerprints: Sequence[str],
    choices: Sequence[Choices] | None = None,
    execute: int | None = None,
    ensemble: int | None = None,
    log: Path | None = None,
    workers: int = 1,
    threads: int | None = None,
    progress: Progress | None = None,
    load: Load = load_policy,
    make: Make = environments.make,
    executor: Executor = run_in_processes,
    keep_going: bool = False,
) -> tuple[Run, ...]:
    """Run every policy on the same episodes: episode e of each task has seed ``seed + e``.

    The policies take turns on each episode, so that whatever else the machine does hits all of them
    alike. Each lives in its own process.

    Args:
        policies: what `sqap.load` takes.
        env: name of the environment.
        tasks: of that environment.
        episodes: per task.
        seed: not negative.
        fingerprints: one a policy, as `sqap.checkpoints.fingerprint` gives it.
        choices: one a policy, by which it is loaded; none for sqap's own.
        execute: actions of each chunk that are executed; None for as many as each policy says, or else all.
        ensemble: chunks averaged into each action, as in `run_episode`; None for none.
        log: file of JSON lines that every finished episode is appended to at once. Episodes that are in
            it are not run again; a log of another build, simulator or processor is refused.
        workers: episodes run at the same time, each with a process per policy. Successes come faster so,
            but latencies and memory are those of a busy machine: read them from one worker's runs.
        threads: torch threads of each process; None shares the cores out among the workers.
        progress: called with each record, the episodes done and the episodes asked for, all policies'
            counted, those in the log included.
        load: builds a policy from its path in the worker process.
        make: builds an environment there.
        executor: where episodes run: `run_in_processes`, `run_here` or a `RayExecutor`.
        keep_going: an episode that raises, or whose process dies again and again, is a failed one
            (`Episode.failure`); else it ends the evaluation.

    Returns:
        One run a policy, in their order.

    Raises:
        InputError: an argument is out of range, names nothing, or does not fit the log.
        SqapError: whatever a policy or environment refuses, in its own words.
        KeyboardInterrupt: after the processes are ended; finished episodes are in the log.
    """
    environments.check_tasks(env, tasks, episodes)
    _check(policies, fingerprints, episodes, seed, workers, threads)
    make_ensemble(ensemble, execute)  # what it refuses is refused before any policy is loaded
    choices = choices or [Choices()] * len(policies)
    settings = current_settings(
        env, execute=execute, workers=workers, threads=threads, ensemble=ensemble, choices=choices
    )
    grid = [(task, seed + e) for task in tasks for e in range(episodes)]
    specs = [
        WorkerSpec(_path(policy), fingerprint, settings, chosen, load, make, keep_going)
        for policy, fingerprint, chosen in zip(policies, fingerprints, choices, strict=True)
    ]
    with EpisodeLog(log, settings, fingerprints) as journal:
        logged = dict(journal.finished)
        pending = [(*cell, missing) for cell in grid if (missing := _missing(cell, fingerprints, journal))]
        total = len(grid) * len(policies)
        done = total - sum(len(missing) for _, _, missing in pending)
        with contextlib.closing(executor(specs, pending, workers)) as records:
            for record in records:
                journal.add(record)
                done += 1
                if progress is not None:
                    progress(record, done, total)
        return tuple(
            Run(
                policy=str(policy),
                env=env,
                seed=seed,
                records=tuple(journal.finished[(fingerprint, *cell)] for cell in grid),
                from_log=tuple(logged[key] for cell in grid if (key := (fingerprint, *cell)) in logged),
            )
            for policy, fingerprint in zip(policies, fingerprints, strict=True)
        )


def _path(policy: str | Path) -> str:
    """What the worker loads: a `Path` stays a path, even one that is spelt like a bundled policy's name."""
    return policy if isinstance(policy, str) else str(policy.absolute())


def _missing(cell: tuple[str, int], fingerprints: Sequence[str], journal: EpisodeLog) -> list[int]:
    """The policies, by number, that have not run the episode ``cell``, a task and a seed."""
    return [i for i, fingerprint in enumerate(fingerprints) if (fingerprint, *cell) not in journal.finished]


def _check(
    policies: Sequence[str | Path],
    fingerprints: Sequence[str],
    episodes: int,
    seed: int,
    workers: int,
    threads: int | None,
) -> None:
    for name, value in (("episodes", episodes), ("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if seed < 0:
        raise InputError(f"the seed must not be negative, got {seed}")
    if not policies or len(policies) != len(fingerprints):
        raise InputError(
            f"every policy needs a fingerprint: got {len(policies)} policies and {len(fingerprints)} of them"
        )
    if len(set(fingerprints)) < len(fingerprints):
        raise InputError("two of the policies are the same; there is nothing to compare")
