"""The simulators sqap knows by name, and what each of them is asked to run by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqap.environments import metaworld
from sqap.environments.base import Environment, StepResult
from sqap.environments.metaworld_tasks import INSTRUCTIONS
from sqap.errors import InputError

__all__ = [
    "ControlUnits",
    "Environment",
    "StepResult",
    "action_units",
    "check_tasks",
    "default_tasks",
    "describe",
    "make",
]


@dataclass(frozen=True)
class ControlUnits:
    """What the numbers in an action mean.

    Args:
        metres: displacement of the gripper's target in one control step, per unit of the first three entries.
        hz: control steps per second.
        limit: the environment clips entries to [-limit, limit].
        gripper: the entry whose sign opens or closes the gripper; None if there is none.
    """

    metres: float = 1.0
    hz: float = 1.0
    limit: float = float("inf")
    gripper: int | None = None


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
    return _suite(env).make(task)


def check_tasks(env: str, tasks: Sequence[str]) -> None:
    """Raise `InputError` unless ``tasks`` names tasks of ``env``, at least one and none twice."""
    known = _suite(env).tasks
    if not tasks:
        raise InputError(f"no tasks are named; {env} has {', '.join(known)}")
    for task in tasks:
        if task not in known:
            raise InputError(f"unknown {env} task {task!r}; known tasks: {', '.join(known)}")
    repeated = sorted({task for task in tasks if tasks.count(task) > 1})
    if repeated:
        raise InputError(f"task {repeated[0]!r} is named more than once")


def default_tasks(env: str) -> tuple[str, ...]:
    """The tasks that are run if the user names none."""
    return _suite(env).default_tasks


def action_units(env: str) -> ControlUnits:
    """The units of ``env``'s actions."""
    return _suite(env).units


def describe(env: str) -> dict[str, str]:
    """The versions and settings of ``env`` that decide what an episode is, besides its task and seed."""
    return _suite(env).describe()


def _suite(env: str) -> _Suite:
    if env not in _SUITES:
        raise InputError(f"unknown environment {env!r}; known environments: {', '.join(_SUITES)}")
    return _SUITES[env]
