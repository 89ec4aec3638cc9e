"""Images with the action chunk that the scripted expert would take from there.

Meta-World's experts are stateless functions of the simulator's state, so every visited state can be
labelled with what the expert *would* do next: the simulator is copied, the expert acts in the copy for
one chunk, and the copy is thrown away. That makes labels clean whoever drives the real episode: the
expert, the expert with disturbances, or the policy in training (DAgger).

One shard is one task x one block of seeds, written whole or not at all, so an interrupted run resumes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reference.settings import DATA, HORIZON, IMAGE_SIZE, TASKS
from sqap.environments.metaworld import CAMERA, MetaWorld
from sqap.observation import Observation

STRIDE = 2  # one picture every two control steps: neighbours are nearly the same
EPISODES_PER_SHARD = 25
STATE_DIM = 14  # hand, gripper opening, object position and rotation, tool centre

Driver = Callable[[Observation | None, np.ndarray], np.ndarray]


@dataclass
class Samples:
    """Parallel lists, one entry per labelled frame."""

    images: list[np.ndarray]
    chunks: list[np.ndarray]
    states: list[np.ndarray]


class Expert:
    """Meta-World's scripted policy for a task, in and out of a copy of the simulator."""

    def __init__(self, env: MetaWorld) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self.env = env
        self._policy = ENV_POLICY_MAP[f"{env.task}-v3"]()

    def action(self) -> np.ndarray:
        return np.clip(self._policy.get_action(self.env.state_vector), -1.0, 1.0)

    def chunk(self, horizon: int = HORIZON) -> np.ndarray:
        """``(horizon, 4)`` actions from the present state, which is left as it was."""
        snapshot = _save(self.env)
        actions = []
        for _ in range(horizon):
            actions.append(self.action())
            self.env.step(actions[-1])
        _restore(self.env, snapshot)
        return np.stack(actions)


def _save(env: MetaWorld) -> dict[str, Any]:
    import mujoco

    sim = env.simulator
    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    physics = np.empty(mujoco.mj_stateSize(sim.model, spec))
    mujoco.mj_getState(sim.model, sim.data, physics, spec)
    return {
        "physics": physics,
        "path": sim.curr_path_length,
        "prev": np.copy(sim._prev_obs),
        "stable": np.copy(sim._last_stable_obs) if sim._last_stable_obs is not None else None,
        "vector": env._vector.copy(),
        "steps": env._steps,
    }


def _restore(env: MetaWorld, snapshot: dict[str, Any]) -> None:
    import mujoco

    sim = env.simulator
    mujoco.mj_setState(sim.model, sim.data, snapshot["physics"], mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(sim.model, sim.data)
    sim.curr_path_length = snapshot["path"]
    sim._prev_obs = snapshot["prev"]
    sim._last_stable_obs = snapshot["stable"]
    env._vector = snapshot["vector"]
    env._steps = snapshot["steps"]


def privileged_state(env: MetaWorld) -> np.ndarray:
    """``(STATE_DIM,)`` what an auxiliary training head regresses; a policy may read what is of the robot."""
    return np.concatenate([env.state_vector[:11], env.simulator.tcp_center]).astype(np.float32)


class Disturbance:
    """Now and then, a push in a random direction, so that the expert is seen recovering."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        kind = rng.random()
        self._sigma = 0.0 if kind < 0.25 else rng.uniform(0.1, 0.6)
        self._burst_chance = 0.0 if kind < 0.4 else 0.04
        self._left = int(rng.integers(0, 16)) if kind >= 0.6 else 0
        self._direction = rng.uniform(-1, 1, 4)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        if self._left == 0 and self._rng.random() < self._burst_chance:
            self._left = int(self._rng.integers(3, 12))
            self._direction = self._rng.uniform(-1, 1, 4)
        if self._left > 0:
            self._left -= 1
            return self._direction
        return action + self._sigma * self._rng.normal(size=4)


def record_demonstration(env: MetaWorld, seed: int, into: Samples) -> bool:
    """One episode driven by the disturbed expert."""
    rng = np.random.default_rng(seed)
    expert, disturb = Expert(env), Disturbance(rng)
    env.reset(seed)
    phase = int(rng.integers(STRIDE))
    while True:
        if env._steps % STRIDE == phase:
            _append(env, expert, into)
        result = env.step(disturb(expert.action()))
        if result.success or result.truncated:
            return result.success


def record_rollout(env: MetaWorld, seed: int, policy: Any, into: Samples) -> bool:
    """One episode driven by the policy in training: DAgger's states, the expert's labels."""
    rng = np.random.default_rng(seed)
    expert = Expert(env)
    observation = env.reset(seed)
    while True:
        _append(env, expert, into, observation)
        chunk = policy.act(observation, seed=int(rng.integers(2**31)))
        for step, action in enumerate(chunk):
            if step and step % (2 * STRIDE) == 0:
                _append(env, expert, into)
            result = env.step(action)
            if result.success or result.truncated:
                return result.success
        observation = env.observe()


def _append(env: MetaWorld, expert: Expert, into: Samples, observation: Observation | None = None) -> None:
    observation = observation or env.observe()
    into.images.append(observation.images[CAMERA])
    into.states.append(privileged_state(env))
    into.chunks.append(expert.chunk())


def write_shard(task: str, first_seed: int, episodes: int, path: Path, policy_dir: str | None) -> str:
    """Record episodes into ``path`` (.npz is too slow to map; three .npy files)."""
    import torch

    torch.set_num_threads(1)
    policy = None
    if policy_dir is not None:
        import sqap

        policy = sqap.load(policy_dir)
    env = MetaWorld(task, IMAGE_SIZE)
    samples = Samples([], [], [])
    wins = 0
    for seed in range(first_seed, first_seed + episodes):
        if policy is None:
            wins += record_demonstration(env, seed, samples)
        else:
            wins += record_rollout(env, seed, policy, samples)
    env.close()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    np.save(temporary / "images.npy", np.stack(samples.images))
    np.save(temporary / "chunks.npy", np.stack(samples.chunks).astype(np.float32))
    np.save(temporary / "states.npy", np.stack(samples.states))
    temporary.rename(path)
    return f"{path.name}: {len(samples.images)} frames, {wins}/{episodes} succeed"


def collect(
    name: str,
    episodes: int,
    first_seed: int,
    workers: int,
    policy_dir: str | None = None,
) -> list[Path]:
    """Shards of data set ``name``, missing ones written: ``episodes`` a task from ``first_seed`` on."""
    root = DATA / name
    root.mkdir(parents=True, exist_ok=True)
    size = min(EPISODES_PER_SHARD, episodes)
    blocks = range(episodes // size)
    shards = {
        root / f"{task}-{block:03d}": (task, first_seed + block * size, size)
        for block in blocks
        for task in TASKS
    }
    jobs = [(*job, path, policy_dir) for path, job in shards.items() if not path.exists()]
    # Spawned, because a process forked from one that has trained inherits torch's threads dead.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(write_shard, *zip(*jobs, strict=True)) if jobs else ():
            print(line, flush=True)
    return sorted(shards)
