"""The benchmarks of vla-eval (LIBERO, SIMPLER, ...) as an `Environment`, in an interpreter of their own.

Simulators pin what sqap cannot have beside it. ``vla-eval:CONFIG`` names a configuration of vla-eval, and
`INTERPRETER` the command that starts a Python with vla-eval and the simulator: a path, or one that ends so,
as ``docker run -i IMAGE python``. `vla_eval_process` is what runs there, and says how the two talk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqap.environments.base import ControlUnits, StepResult
from sqap.environments.vla_eval_conversion import GRIPPER, WIDTH, Conversion
from sqap.errors import InputError, SqapError
from sqap.observation import Observation
from sqap.serialization import from_json

PREFIX = "vla-eval:"
INTERPRETER = "SQAP_SIM_PYTHON"
SILENCE = 1800.0  # seconds after which a simulator is taken for hung; the first reset of some takes minutes
UNLIMITED = 100_000  # episodes of a task whose benchmark declares no number of initial states
GRACE_SECONDS = 10


class SimulatorError(SqapError):
    """A simulator raised, hung or died. The episode has failed; another may not."""


@dataclass(frozen=True)
class HarnessTask:
    """One task of a benchmark.

    Args:
        name: vla-eval's; numbered where two tasks of a configuration share it.
        initial_states: how many there are; None if the benchmark does not declare it.
        action_dim: likewise.
        max_steps: control steps of an episode.
    """

    name: str
    initial_states: int | None
    action_dim: int | None
    max_steps: int


@dataclass(frozen=True)
class Harness:
    """What a configuration offers.

    Args:
        tasks: in vla-eval's order.
        conversion: the configuration's section ``sqap``.
        simulator: versions and settings that decide what an episode is.
    """

    tasks: tuple[HarnessTask, ...]
    conversion: Conversion
    simulator: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return tuple(task.name for task in self.tasks)

    @property
    def units(self) -> ControlUnits:
        """Of the actions, as far as the configuration says them."""
        arm = all(task.action_dim == WIDTH for task in self.tasks)
        return ControlUnits(self.conversion.metres, self.conversion.hz, gripper=GRIPPER if arm else None)


_KNOWN: dict[str, Harness] = {}  # by environment; each process asks once


def harness(env: str) -> Harness:
    """What ``env`` offers, which a simulator is started for that says it.

    Raises:
        InputError: no interpreter is named, it cannot be started or has no vla-eval, or vla-eval or sqap
            refuses the configuration.
        SimulatorError: the process died.
    """
    if env not in _KNOWN:
        _Simulator(env).close()
    return _KNOWN[env]


def check_episodes(env: str, tasks: Sequence[str], episodes: int) -> None:
    """Raise `InputError` if a task has fewer initial states than ``episodes``: some would run twice."""
    for task in harness(env).tasks:
        states = task.initial_states or UNLIMITED
        if task.name in tasks and states < episodes:
            raise InputError(f"{task.name!r} has {states} initial states, fewer than {episodes} episodes")


def unmeasured(env: str) -> list[str]:
    """Sentences on what is not measured in ``env``."""
    units = harness(env).units
    lacking = {
        "jerk and path length are not measured: its configuration has no sqap: metres": units.metres,
        f"gripper flips are not counted: the benchmark does not declare actions of {WIDTH}": units.gripper,
    }
    return [sentence for sentence, unit in lacking.items() if unit is None]


class VlaEval:
    """One task. vla-eval's runner counts the steps, and its benchmark says what success is.

    Args:
        env: ``vla-eval:CONFIG``.
        task: one of `Harness.names`.

    Raises:
        InputError: as `harness`, or there is no such task.
    """

    def __init__(self, env: str, task: str) -> None:
        self._simulator = _Simulator(env)
        found = _KNOWN[env]
        if task not in found.names:
            self.close()
            raise InputError(f"unknown {env} task {task!r}; known tasks: {', '.join(found.names)}")
        self._index = found.names.index(task)
        self._initial_states = found.tasks[self._index].initial_states or UNLIMITED
        self._conversion = found.conversion
        self.task = task
        self.action_dim = found.tasks[self._index].action_dim
        self.max_steps = found.tasks[self._index].max_steps
        self._seen: Mapping[str, Any] = {}
        self._end: StepResult | None = StepResult(success=False, truncated=True)  # no episode has begun

    def reset(self, seed: int) -> Observation:
        """Start the episode of initial state ``seed``, modulo their number. It depends on none before it.

        Raises:
            SimulatorError: the simulator raised, hung or died.
        """
        if self._end is None:
            self._simulator.send({"abandon": True})
        self._end = None
        self._simulator.send({"start": self._index, "episode": seed % self._initial_states, "seed": seed})
        self._receive()
        return self.observe()

    def step(self, action: np.ndarray) -> StepResult:
        """One control step; none after the episode's end.

        Raises:
            SimulatorError: as `reset`.
        """
        if self._end is None:
            self._simulator.send({"action": self._conversion.action(action).tolist()})
            self._receive()
        return self._end or StepResult(success=False, truncated=False)

    def observe(self) -> Observation:
        """The present moment; after the end the last that vla-eval's runner looked at, one step before."""
        return self._conversion.observation(self._seen)

    def close(self) -> None:
        """End the simulator's process."""
        self._simulator.close()

    def _receive(self) -> None:
        answer = self._simulator.receive()
        if "observation" in answer:
            self._seen = answer["observation"]
            return
        success = bool(answer.get("result", {}).get("success"))
        self._end = StepResult(success=success, truncated=not success)
        if "result" not in answer:
            raise SimulatorError(f"the simulator raised {answer.get('error', answer)}")


class _Simulator:
    """A simulator's process, which has told what is in `_KNOWN`."""

    def __init__(self, env: str) -> None:
        self._env = env
        command = shlex.split(os.environ.get(INTERPRETER, ""))
        if not command:
            raise InputError(
                f"{env} runs in an interpreter of its own, which has vla-eval and the simulator: name it by "
                f"--sim-python or {INTERPRETER}"
            )
        config = Path(env.removeprefix(PREFIX)).absolute()
        if not config.is_file():
            raise InputError(f"there is no configuration of vla-eval at {config}")
        source = Path(__file__).with_name("vla_eval_process.py").read_text(encoding="utf-8")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        try:
            self._process = subprocess.Popen(
                [*command, "-c", source],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for sqap, with whose end this one's input ends
            )
        except OSError as problem:
            raise InputError(
                f"cannot start the simulator's interpreter {command[0]}: {problem.strerror}"
            ) from problem
        try:
            self.send({"config": str(config)})
            greeting = self.receive()
            if "refused" in greeting:
                raise InputError(f"{command[0]} cannot run {config.name}: {greeting['refused']}")
            _KNOWN[env] = _read(greeting, config.name)
        except BaseException:
            self.close()
            raise

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something, also to one that is dead, which `receive` notices."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            SimulatorError: none comes.
        """
        assert self._process.stdout is not None
        timer = threading.Timer(SILENCE, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
        raise SimulatorError(f"the simulator of {self._env} {self._death(line)}")

    def _death(self, line: bytes) -> str:
        if line.endswith(b"\n"):
            return f"answered {line[:80].decode(errors='replace').strip()!r}, which is no message"
        try:
            code = self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        self._said.seek(0)
        words = self._said.read().decode(errors="replace").strip().splitlines()
        return f"ended with exit code {code}" + (f"; its last words: {words[-1]}" if words else "")

    def close(self) -> None:
        """End the process: by the end of its input, or else by force. Safe to call twice."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


def _environment() -> dict[str, str]:
    """Variables of the simulator's process, without those of this interpreter."""
    found = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if found.get("MUJOCO_GL") == "osmesa":  # sqap's default for Meta-World; vla-eval has ``render: cpu``
        del found["MUJOCO_GL"]
    return found


def _read(greeting: Mapping[str, Any], config: str) -> Harness:
    tasks = [from_json(HarnessTask, task, f"a task of {config}", InputError) for task in greeting["tasks"]]
    conversion: Conversion = from_json(Conversion, greeting["sqap"], f"sqap in {config}", InputError)
    for task in tasks:
        if conversion.changes_actions and task.action_dim not in (None, WIDTH):
            raise InputError(
                f"sqap in {config} converts rotations or grippers, which the {task.action_dim} numbers of an "
                f"action of {task.name!r} do not have"
            )
    text = json.dumps(greeting["config"], sort_keys=True).encode()
    mark = hashlib.sha256(text).hexdigest()[:12]
    return Harness(tuple(tasks), conversion, {"configuration": mark} | greeting["versions"])
