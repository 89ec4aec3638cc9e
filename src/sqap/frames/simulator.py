"""Calibration frames: what a policy sees while it works, from seeds no evaluation uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from sqap import environments
from sqap.evaluation.rollout import Actor, noise_seed, own_execute
from sqap.observation import Observation

CALIBRATION_SEED = 500_000
LOOKS_PER_EPISODE = 6


def collect_frames(
    policy: Actor,
    env: str,
    tasks: Sequence[str],
    count: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    seed: int = CALIBRATION_SEED,
) -> list[Observation]:
    """``count`` observations, spread over ``tasks`` and over the first looks of the policy's episodes.

    Deterministic: the same policy gives the same frames. ``progress`` gets (frames so far, count); episodes
    have the seeds from ``seed`` on.

    Raises:
        InputError: the environment or a task is unknown, or the simulator is not installed.
    """
    environments.check_tasks(env, tasks)
    shares = [len(range(i, count, len(tasks))) for i in range(len(tasks))]
    frames: list[Observation] = []
    for task, share in zip(tasks, shares, strict=True):
        if share:
            with closing(environments.make(env, task)) as simulator:
                frames += _frames_of_task(policy, simulator, share, seed)
        if progress is not None:
            progress(len(frames), count)
    return frames


def _frames_of_task(policy: Actor, env: environments.Environment, count: int, seed: int) -> list[Observation]:
    frames: list[Observation] = []
    while len(frames) < count:
        observation, memory = env.reset(seed), None
        for look in range(min(LOOKS_PER_EPISODE, count - len(frames))):
            frames.append(observation)
            step = policy.step(observation, seed=noise_seed(seed, look), memory=memory)
            memory = step.memory
            results = [env.step(action) for action in step.chunk[: own_execute(policy)]]
            if results[-1].success or results[-1].truncated:
                break
            observation = env.observe()
        seed += 1
    return frames
