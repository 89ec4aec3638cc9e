"""Stands for an interpreter with vla-eval 0.8: has the names of it that sqap uses, and runs a program.

The runner does as vla-eval's; `test_vla_eval.py` runs the same tests with vla-eval where there is one.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys
from types import ModuleType
from typing import Any

import yaml


@dataclasses.dataclass
class EvalConfig:
    benchmark: str
    mode: str = "sync"
    subname: str | None = None
    max_steps: int | None = None
    max_tasks: int | None = None
    tasks: list[str] | None = None
    params: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvalConfig:
        if not data.get("benchmark"):
            raise ValueError("Config error: 'benchmark' field is required and cannot be empty.")
        return cls(**data)

    def resolved_name(self) -> str:
        return self.benchmark


@dataclasses.dataclass
class DimSpec:
    name: str
    dims: int
    format: str


@dataclasses.dataclass
class StepResult:
    obs: Any
    reward: float
    done: bool
    info: dict[str, Any]


class StepBenchmark:
    async def start_episode(self, task: Any, recorder: Any = None) -> None:
        self._task = task
        self._last = StepResult(self.reset(task), 0.0, False, {})

    async def apply_action(self, action: Any) -> None:
        self._last = self.step(action)

    async def get_observation(self) -> Any:
        return self.make_obs(self._last.obs, self._task)

    async def is_done(self) -> bool:
        return self._last.done

    async def get_result(self) -> Any:
        return self.get_step_result(self._last)


class PhaseError(RuntimeError):
    pass


class SyncEpisodeRunner:
    async def run_episode(self, benchmark: Any, task: Any, conn: Any, *, max_steps: int | None = None) -> Any:
        try:
            await benchmark.start_episode(task, recorder=None)
            seen = await benchmark.get_observation()
            await conn.start_episode({"task": task})
            for steps in itertools.count(1):
                await benchmark.apply_action(await conn.act(seen))
                if await benchmark.is_done() or steps == max_steps:
                    break
                seen = await benchmark.get_observation()
            result = {"metrics": await benchmark.get_result(), "steps": steps, "elapsed_sec": 0.0}
        except Exception as problem:
            raise PhaseError(f"{type(problem).__name__}: {problem}") from problem
        await conn.end_episode(result)
        return result


def load_config(path: str) -> Any:
    with open(path) as file:
        return yaml.safe_load(file) or {}


def resolve_import_string(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def normalize_render_mode(value: Any) -> str:
    mode = "gpu" if value is None else str(value)
    if mode not in ("gpu", "cpu"):
        raise ValueError(f"render: {value!r} is not supported (choose one of: gpu, cpu).")
    return mode


def install() -> None:
    """Put the modules where imports find them."""
    contents = {
        "vla_eval": [],
        "vla_eval.benchmarks": [],
        "vla_eval.benchmarks.base": [StepBenchmark, StepResult],
        "vla_eval.cli": [],
        "vla_eval.cli.config_loader": [load_config],
        "vla_eval.config": [EvalConfig],
        "vla_eval.registry": [resolve_import_string],
        "vla_eval.render": [normalize_render_mode],
        "vla_eval.runners": [],
        "vla_eval.runners.sync_runner": [SyncEpisodeRunner],
        "vla_eval.specs": [DimSpec],
        "websockets": [],
        "websockets.exceptions": [],
    }
    for name, members in contents.items():
        module = sys.modules[name] = ModuleType(name)
        for member in members:
            setattr(module, member.__name__, member)
    sys.modules["vla_eval.render"].apply_render_mode = lambda kind, mode, name: {}


if __name__ == "__main__":
    install()
    exec(compile(sys.argv[1], "vla_eval_process.py", "exec"), {"__name__": "__main__"})
