"""A benchmark of vla-eval that needs no simulator, with a simulator's faults; real vla-eval runs it, too."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import DimSpec


class Drawer(StepBenchmark):
    """Noise of the task, the episode and the step; what it was sent last is the observation's state.

    Args:
        tasks: their names.
        states: initial states of each; None to declare none.
        raises: episodes that raise at their third step.
        dies: episodes at whose third step the process dies.
        width: numbers of an action.
        started: file that every start is noted in.
    """

    render_backends = frozenset({"gpu", "cpu"})

    @classmethod
    def configure_render(cls, mode: str) -> dict[str, str]:
        return {}

    def __init__(
        self,
        tasks: Any = ("open", "close"),
        states: int | None = 20,
        raises: Any = (),
        dies: Any = (),
        width: int = 7,
        started: str | None = None,
    ) -> None:
        super().__init__()
        self.tasks, self.states, self.raises, self.dies = tasks, states, raises, dies
        self.width, self.started = width, started
        self.built = False

    def get_tasks(self) -> list[dict[str, Any]]:
        print("what simulators print is no message")
        return [{"name": name, "suite": "drawers"} for name in self.tasks]

    def reset(self, task: dict[str, Any]) -> Any:
        if not self.built:  # as LIBERO's, which is seeded where it is built
            np.random.seed(7)
            random.seed(7)
            self.built = True
        self.episode, self.steps, self.action = task["episode_idx"], 0, np.zeros(self.width)
        self.drawn = np.random.random() + random.random()
        if self.started is not None:
            with open(self.started, "a") as file:
                file.write(f"{os.getpid()} {task['name']} {self.episode}\n")
        return None

    def step(self, action: dict[str, Any]) -> StepResult:
        self.action = np.asarray(action["actions"])
        assert self.action.shape == (self.width,)
        self.steps += 1
        if self.steps == 3 and self.episode in self.raises:
            raise RuntimeError("the solver diverged")
        if self.steps == 3 and self.episode in self.dies:
            os._exit(7)
        done = self.steps >= 4 and self.episode % 2 == 0 and bool(self.action[0] > 0)
        return StepResult(obs=None, reward=0.0, done=done, info={})

    def make_obs(self, raw_obs: Any, task: dict[str, Any]) -> dict[str, Any]:
        generator = np.random.default_rng((len(task["name"]), self.episode, self.steps))
        front = generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)
        front[0, 0, 0] = int(100 * self.drawn)
        return {
            "images": {"agentview": front, "wrist": front[::-1]},
            "task_description": f"{task['name']} the drawer",
            "states": np.concatenate([self.action, [self.drawn]]),
        }

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": np.bool_(step_result.done)}

    def get_metadata(self) -> dict[str, Any]:
        states = {} if self.states is None else {"max_episodes_per_task": self.states}
        return {"max_steps": 220, **states}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"action": DimSpec("action", self.width, "raw")}
