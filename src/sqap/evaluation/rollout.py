"""One episode in closed loop: the policy looks, its actions are executed, and it looks again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sqap.environments import ControlUnits, Environment
from sqap.errors import InputError
from sqap.evaluation.ensemble import AdaptiveEnsemble
from sqap.evaluation.statistics import flips, jerk, path_length
from sqap.observation import Observation
from sqap.pruning.memory import Memory
from sqap.serialization import from_json

if TYPE_CHECKING:
    from sqap.policy import Step
    from sqap.pruning.selector import Selection

Watch = Callable[[Observation, "Selection | None", int], None]

_RAW_UNITS = ControlUnits()


class Actor(Protocol):
    """What an episode is driven by: `sqap.policy.Policy`, or anything else with this method."""

    def step(
        self, observation: Observation, *, seed: int | None = None, memory: Memory | None = None
    ) -> Step: ...


@dataclass(frozen=True)
class Episode:
    """What one episode came to.

    Args:
        task: its task.
        seed: the environment's seed; with `noise_seed` it fixes the diffusion noise too.
        success: whether the task's success flag was up at any step.
        steps: control steps executed.
        jerk: of the executed actions, as `sqap.evaluation.statistics.jerk` defines it; None where it is not
            known what an action's numbers are in metres.
        latencies_ms: wall time of the policy's calls, observation in, actions out, in order.
        path_length: of the executed displacements, as `sqap.evaluation.statistics.path_length` defines it;
            None likewise, in logs from before it was noted, and of failed episodes.
        gripper_flips: how often the gripper's command changed; None also where actions have none.
        failure: why the episode could not be run to its end; None of one that was.
    """

    task: str
    seed: int
    success: bool
    steps: int
    jerk: float | None
    latencies_ms: tuple[float, ...]
    path_length: float | None = None
    gripper_flips: int | None = None
    failure: str | None = None

    @classmethod
    def failed(cls, task: str, seed: int, reason: str) -> Episode:
        """An episode that an error ended: without success, and without anything measured."""
        return cls(task, seed, success=False, steps=0, jerk=0.0, latencies_ms=(), failure=reason)

    @classmethod
    def from_json(cls, data: Any) -> Episode:
        """The episode that `to_json` wrote.

        Raises:
            InputError: a key is unknown or missing, or a value has the wrong type.
        """
        episode: Episode = from_json(cls, data, "episode", InputError)
        return episode

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return dataclasses.asdict(self)


def noise_seed(seed: int, call: int) -> int:
    """Seed of the diffusion noise at the policy's ``call``-th look in the episode with ``seed``.

    It depends on nothing else, so two policies in the same episode draw the same noise and a difference
    between them is not luck.
    """
    return int(np.random.SeedSequence((seed, call)).generate_state(1)[0])


def run_episode(
    policy: Actor,
    env: Environment,
    seed: int,
    *,
    units: ControlUnits = _RAW_UNITS,
    execute: int | None = None,
    ensemble: int | None = None,
    watch: Watch | None = None,
) -> Episode:
    """Run ``policy`` until the task succeeds or ``env`` says that time is up.

    Args:
        policy: asked for a chunk of actions at a time.
        env: reset with ``seed`` first; left open.
        seed: not negative.
        units: what the jerk is measured in.
        execute: actions of each chunk that are executed before the policy looks again; None for as many as
            the policy says, or else all.
        ensemble: if given, the policy looks at every control step, and one action is executed: what this
            many of its latest chunks say for that step, averaged (`sqap.evaluation.ensemble`).
        watch: called with the observation, the policy's latest selection of visual tokens and the number
            of control steps done, before every control step and after the last. Each call renders.

    Raises:
        InputError: the chunk does not fit the environment, ``execute`` or ``ensemble``, an action is not
            finite, or both ``execute`` and ``ensemble`` are given.
    """
    averaged = make_ensemble(ensemble, execute)
    execute = own_execute(policy) if execute is None else execute
    observation = env.reset(seed)
    actions: list[np.ndarray] = []
    latencies: list[float] = []
    memory: Memory | None = None
    while True:
        begin = time.perf_counter()
        step = policy.step(observation, seed=noise_seed(seed, len(latencies)), memory=memory)
        memory = step.memory
        latencies.append(round(1e3 * (time.perf_counter() - begin), 3))
        _check_chunk(step.chunk, env, execute)
        planned = step.chunk[:execute] if averaged is None else averaged.add(step.chunk)[None]
        for position, action in enumerate(planned):
            if watch is not None:
                watch(env.observe() if position else observation, step.selection, len(actions))
            actions.append(np.clip(action, -units.limit, units.limit))
            result = env.step(action)
            if result.success or result.truncated:
                if watch is not None:
                    watch(env.observe(), step.selection, len(actions))
                executed = np.stack(actions)
                return Episode(
                    task=env.task,
                    seed=seed,
                    success=result.success,
                    steps=len(actions),
                    jerk=None if units.metres is None else jerk(executed, units.metres, units.hz),
                    latencies_ms=tuple(latencies),
                    path_length=None if units.metres is None else path_length(executed, units.metres),
                    gripper_flips=None if units.gripper is None else flips(executed[:, units.gripper]),
                )
        observation = env.observe()


def own_execute(policy: Actor) -> int | None:
    """How many actions of a chunk a policy itself wants executed; None if it does not say."""
    found: int | None = getattr(getattr(policy, "config", None), "n_action_steps", None)
    return found


def make_ensemble(window: int | None, execute: int | None) -> AdaptiveEnsemble | None:
    """One episode's ensemble; None if ``window`` is None.

    Raises:
        InputError: ``window`` is smaller than 1, or ``execute`` is given too.
    """
    if window is None:
        return None
    if execute is not None:
        raise InputError(f"an ensemble executes one action a look; execute={execute} cannot be asked for too")
    return AdaptiveEnsemble(window)


def _check_chunk(chunk: np.ndarray, env: Environment, execute: int | None) -> None:
    horizon, width = chunk.shape
    if env.action_dim is not None and width != env.action_dim:
        raise InputError(f"the policy gives {width} numbers an action, but {env.task} takes {env.action_dim}")
    if execute is not None and not 1 <= execute <= horizon:
        raise InputError(f"execute must be from 1 to {horizon}, the actions in a chunk, got {execute}")
    if not np.isfinite(chunk).all():
        raise InputError(f"the policy gave an action on {env.task} that is not finite")
