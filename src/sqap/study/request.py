"""What is asked of a study, besides its design."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqap import environments
from sqap.checkpoints.choices import Choices
from sqap.environments import vla_eval
from sqap.environments.vla_eval import SimulatorError
from sqap.errors import InputError, SqapError
from sqap.evaluation.executors import Executor
from sqap.evaluation.lanes import run_here, run_in_processes
from sqap.evaluation.rollout import Actor, run_episode
from sqap.evaluation.settings import Settings, current_settings
from sqap.process import available_cores

logger = logging.getLogger("sqap")

EXECUTORS = ("serial", "processes", "ray")
REPLAY_SEED, REPLAY_FRAMES = 520_000, 24  # of frames that policies are measured on


@dataclass(frozen=True)
class StudyRequest:
    """Which policy runs which episodes, where, and what it is calibrated on.

    Args:
        source: the original, as `sqap.load` takes it.
        out: the study's directory.
        env: name of the environment.
        tasks: of that environment.
        episodes: per task.
        seed: of each task's first episode.
        executor: one of `EXECUTORS`.
        workers: episodes at a time.
        address: of a Ray cluster; None starts one here.
        frames: that policies are calibrated on.
        frames_from: where they come from, as for `sqap.frames.read_frames`.
        choices: by which a published policy is loaded.
        command: the command line, for the record.

    Raises:
        InputError: a setting is out of range or contradicts another.
    """

    source: str
    out: Path
    env: str
    tasks: tuple[str, ...]
    episodes: int
    seed: int
    executor: str = "processes"
    workers: int = 1
    address: str | None = None
    frames: int = 48
    frames_from: str = "metaworld"
    choices: Choices = Choices()  # noqa: RUF009 - it is frozen
    command: str = ""

    def __post_init__(self) -> None:
        environments.check_tasks(self.env, self.tasks, self.episodes)
        if self.executor not in EXECUTORS:
            raise InputError(f"--executor must be one of {', '.join(EXECUTORS)}, got {self.executor}")
        if self.executor == "serial" and self.workers > 1:
            raise InputError(f"--executor serial runs one episode at a time, not --workers {self.workers}")
        if self.executor == "ray" and self.env.startswith(vla_eval.PREFIX):
            raise InputError(
                f"--executor ray does not run {self.env}, whose simulator's interpreter is on this machine"
            )
        if self.address is not None and self.executor != "ray":
            raise InputError(f"--address {self.address} is of a Ray cluster; give --executor ray, too")

    @property
    def pairs(self) -> int:
        """Episodes of each cell."""
        return len(self.tasks) * self.episodes

    def settings(self) -> Settings:
        """Of the evaluation of each cell, as they are now, here."""
        chosen = [self.choices]
        return current_settings(self.env, workers=self.workers, choices=chosen)


@contextmanager
def executor(request: StudyRequest) -> Iterator[Executor]:
    """Where the episodes run.

    Raises:
        InputError: there is no Ray, or no cluster at the address.
    """
    if request.executor == "ray":
        from sqap.evaluation.cluster import RayExecutor  # asks for Ray when it is asked for

        with closing(RayExecutor(request.address)) as cluster:
            yield cluster
    else:
        yield run_here if request.executor == "serial" else run_in_processes


def probe(policy: Actor, request: StudyRequest) -> float:
    """Seconds that one episode takes the original here, alone. It is not kept.

    Raises:
        SqapError: the policy does not fit the environment, or the simulator is not there.
    """
    with closing(environments.make(request.env, request.tasks[0])) as world:
        begin = time.perf_counter()
        try:
            run_episode(policy, world, request.seed, units=environments.action_units(request.env))
        except Exception as problem:
            if isinstance(problem, SqapError) and not isinstance(problem, SimulatorError):
                raise  # the study counts such an episode as failed, and goes on
            logger.warning("the episode that is timed failed: %s", problem)
        return time.perf_counter() - begin


def machine() -> dict[str, str | int]:
    """What runs the command, besides sqap's own build."""
    return {"python": platform.python_version(), "system": platform.system(), "cores": available_cores()}
