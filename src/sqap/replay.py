"""Recorded episodes replayed through a policy: what it would have done, beside what was done.

At every ``every``-th frame of an episode the policy is given what was recorded, and the actions of its chunk
stand beside those of the frames that follow. Nothing moves, so that an error has no consequences: the numbers
say how far a policy is from its demonstrations and a compressed one from its original, not whether the task
would be done (`sqap.evaluation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sqap.frames.recordings import Recording
from sqap.policy import Policy
from sqap.pruning.memory import Memory


@dataclass(frozen=True)
class Deviation:
    """How far actions are from others, for each dimension of an action, in robot units.

    Args:
        mean: of the absolute difference.
        rms: root mean square difference.
        largest: absolute difference.
    """

    mean: tuple[float, ...]
    rms: tuple[float, ...]
    largest: tuple[float, ...]


def executed(policy: Policy) -> int:
    """How many actions of a chunk are executed before the policy looks again."""
    return policy.config.n_action_steps or policy.config.model.head.horizon


def replay(policy: Policy, recording: Recording, progress: Callable[[], None] | None = None) -> np.ndarray:
    """What a policy would have told the robot at each frame, ``(frames, action_dim)`` in robot units.

    The seed of a step's noise is the frame's number in the dataset, so that two policies have the same.

    Args:
        policy: whose chunks reach from each look to the next.
        recording: the episode.
        progress: called after each step.

    Raises:
        InputError: the policy does not read such observations.
        NonFiniteActionError: its actions would not be finite.
    """
    chunks: list[np.ndarray] = []
    memory: Memory | None = None
    ends = [*recording.looks[1:], len(recording.actions)]
    for frame, end, seen in zip(recording.looks, ends, recording.observations, strict=True):
        step = policy.step(seen, seed=recording.first + frame, memory=memory)
        memory = step.memory
        chunks.append(step.chunk[: end - frame])
        if progress is not None:
            progress()
    return np.concatenate(chunks)


def deviation(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> Deviation:
    """Compare actions of episodes, each ``(frames, action_dim)``, over all their frames."""
    difference = np.abs(np.concatenate([*found]).astype(np.float64) - np.concatenate([*expected]))
    return Deviation(
        tuple(difference.mean(0).tolist()),
        tuple(np.sqrt((difference**2).mean(0)).tolist()),
        tuple(difference.max(0).tolist()),
    )


def spread_of(recorded: Sequence[np.ndarray]) -> tuple[float, ...]:
    """Standard deviation of each dimension of recorded actions."""
    return tuple(np.concatenate([*recorded]).std(0).tolist())


def relative(error: Deviation, spread: Sequence[float]) -> float | None:
    """Root mean square error in units of a dimension's spread, over the dimensions that move at all.

    None if none does.
    """
    shares = [rms / each for rms, each in zip(error.rms, spread, strict=True) if each > 0]
    return float(np.sqrt(np.mean(np.square(shares)))) if shares else None
