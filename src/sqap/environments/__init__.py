"""The simulators sqap knows by name, and what each of them is asked to run by default."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sqap.environments import metaworld, vla_eval
from sqap.environments.base import ControlUnits, Environment, StepResult
from sqap.environments.metaworld_tasks import INSTRUCTIONS
from sqap.errors import InputError

__all__ = [
    "ControlUnits",
    "Environment",
    "StepResult",
    "action_units",
    "check_tasks",
    "command_options",
    "default_tasks",
    "describe",
    "is_environment",
    "make",
    "unmeasured",
]


@dataclass(frozen=True)
class _Suite:
    make: Callable[[str], Environment]
    tasks: tuple[str, ...]
    default_tasks: tuple[str, ...]
    units: ControlUnits
    describe: Callable[[], dict[str, str]]


_SUITES = {
    "metaworld": _Suite(
        make=metaworld.MetaWorld,
        tasks=tuple(sorted(INSTRUCTIONS)),
        # What the reference policy was trained on.
        default_tasks=(
            "drawer-open",
            "drawer-close",
            "window-open",
            "window-close",
            "faucet-open",
            "faucet-close",
            "door-open",
            "door-close",
            "button-press-topdown",
            "button-press",
            "coffee-button",
            "handle-press",
        ),
        units=ControlUnits(
            metres=metaworld.ACTION_METRES * metaworld.ACTION_REPEAT,
            hz=metaworld.CONTROL_HZ,
            limit=1.0,
            gripper=3,
        ),
        describe=metaworld.describe,
    ),
}


def make(env: str, task: str) -> Environment:
    """Build one task of environment ``env``.

    Raises:
        InputError: the environment or the task is unknown, or the simulator is not installed or has nothing
            to render with.
    """
    if env.startswith(vla_eval.PREFIX):  # whose tasks the process tells that the task's environment starts
        return vla_eval.VlaEval(env, task)
    return _suite(env).make(task)


def is_environment(name: str) -> bool:
    """Whether ``name`` is an environment's, rather than a directory of frames."""
    return name in _SUITES or name.startswith(vla_eval.PREFIX)


def check_tasks(env: str, tasks: Sequence[str], episodes: int = 1) -> None:
    """Raise `InputError` unless ``tasks`` names tasks of ``env``, at least one and none twice.

    Each must have so many ``episodes`` that differ.
    """
    known = _suite(env).tasks
    if not tasks:
        raise InputError(f"no tasks are named; {env} has {', '.join(known)}")
    for task in tasks:
        if task not in known:
            raise InputError(f"unknown {env} task {task!r}; known tasks: {', '.join(known)}")
    repeated = sorted({task for task in tasks if tasks.count(task) > 1})
    if repeated:
        raise InputError(f"task {repeated[0]!r} is named more than once")
    if env.startswith(vla_eval.PREFIX):
        vla_eval.check_episodes(env, tasks, episodes)


def default_tasks(env: str) -> tuple[str, ...]:
    """The tasks that are run if the user names none."""
    return _suite(env).default_tasks


def action_units(env: str) -> ControlUnits:
    """The units of ``env``'s actions."""
    return _suite(env).units


def describe(env: str) -> dict[str, str]:
    """The versions and settings of ``env`` that decide what an episode is, besides its task and seed."""
    return _suite(env).describe()


def command_options(env: str) -> list[str]:
    """The options of a command line that mean ``env``."""
    simulator = os.environ.get(vla_eval.INTERPRETER)
    outside = ["--sim-python", simulator] if simulator and env.startswith(vla_eval.PREFIX) else []
    return ["--env", env, *outside]


def unmeasured(env: str) -> list[str]:
    """Sentences on what is not measured in ``env``."""
    return vla_eval.unmeasured(env) if env.startswith(vla_eval.PREFIX) else []


def _suite(env: str) -> _Suite:
    if env.startswith(vla_eval.PREFIX):
        found = vla_eval.harness(env)
        make = partial(vla_eval.VlaEval, env)
        return _Suite(make, found.names, found.names, found.units, lambda: found.simulator)
    if env not in _SUITES:
        known = ", ".join([*_SUITES, f"{vla_eval.PREFIX}CONFIG"])
        raise InputError(f"unknown environment {env!r}; known environments: {known}")
    return _SUITES[env]
