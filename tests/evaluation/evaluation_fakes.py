"""A simulator and policies that need nothing but numpy; worker processes import them by name."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from sqap.environments import StepResult
from sqap.errors import CheckpointError, InputError
from sqap.observation import Observation

HORIZON = 4
MEBIBYTE = 1 << 20


class Corridor:
    """Succeeds when the summed first entries of the actions pass ``goal``; the picture shows the step."""

    action_dim = 4
    max_steps = 30

    def __init__(self, task: str = "walk", goal: float = 10.0) -> None:
        self.task = task
        self.goal = goal
        self.renders = 0
        self.closed = False

    def reset(self, seed: int) -> Observation:
        # An odd seed starts closer, so that episodes differ.
        self.position = float(seed % 2)
        self.steps = 0
        return self.observe()

    def step(self, action: np.ndarray) -> StepResult:
        assert not self.closed
        self.position += float(np.clip(action[0], -1, 1))
        self.steps += 1
        return StepResult(success=self.position >= self.goal, truncated=self.steps >= self.max_steps)

    def observe(self) -> Observation:
        self.renders += 1
        image = np.full((2, 2, 3), self.steps, dtype=np.uint8)
        return Observation(images={"camera": image}, instruction=self.task)

    def close(self) -> None:
        self.closed = True


@dataclass
class Walker:
    """Steps of ``stride`` forward, and noise that moves sideways."""

    stride: float = 1.0
    pause: float = 0.0
    seeds: list[int | None] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)

    def step(
        self, observation: Observation, *, seed: int | None = None, memory: None = None
    ) -> SimpleNamespace:
        time.sleep(self.pause)
        self.seeds.append(seed)
        self.seen.append(int(observation.images["camera"][0, 0, 0]))
        chunk = np.random.default_rng(seed).uniform(-1, 1, (HORIZON, 4)).astype(np.float32)
        chunk[:, 0] = self.stride
        return SimpleNamespace(chunk=chunk, memory=None, selection=f"look {len(self.seeds)}")


@dataclass
class Hungry(Walker):
    """A walker that carries 256 MiB."""

    ballast: np.ndarray = field(default_factory=lambda: np.ones(256 * MEBIBYTE, dtype=np.uint8))


class Buggy:
    def step(
        self, observation: Observation, *, seed: int | None = None, memory: None = None
    ) -> SimpleNamespace:
        return SimpleNamespace(chunk=1 / 0, memory=None)


class Dying:
    def step(
        self, observation: Observation, *, seed: int | None = None, memory: None = None
    ) -> SimpleNamespace:
        os._exit(3)


class Fragile(Walker):
    """A walker whose process dies at its fourth look, if no process has before."""

    def step(self, observation: Observation, **given: object) -> SimpleNamespace:
        deaths = Path(os.environ["FAKE_DEATHS"])
        if len(self.seeds) == 3 and not deaths.exists():
            deaths.write_text("one")
            os._exit(3)
        return super().step(observation, **given)


def load(path: str, choices: object = None, fingerprint: str = "") -> object:
    """What stands for `sqap.load` in worker processes."""
    if path == "missing":
        raise CheckpointError("there is no policy at 'missing'")
    if path == "threads":
        import torch

        raise InputError(f"running with {torch.get_num_threads()} threads")
    if path == "slow":
        print("loading", flush=True)
        time.sleep(600)
    kinds = {
        "walker": Walker,
        "hungry": Hungry,
        "buggy": Buggy,
        "dying": Dying,
        "fragile": Fragile,
        "crawler": lambda: Walker(0.1),
    }
    return kinds[path]()


def load_walker(path: str, choices: object = None, fingerprint: str = "") -> Walker:
    """Whatever is asked for, a walker comes."""
    return Walker()


def load_stroller(path: str, choices: object = None, fingerprint: str = "") -> Walker:
    """A walker that takes a while."""
    return Walker(pause=0.1)


def make(env: str, task: str) -> Corridor:
    """What stands for `sqap.environments.make` in worker processes."""
    return Corridor(task)


def make_seven(env: str, task: str) -> Corridor:
    """A corridor for robots of seven numbers an action, of four steps at most."""
    corridor = Corridor(task)
    corridor.action_dim, corridor.max_steps = 7, 4
    return corridor
