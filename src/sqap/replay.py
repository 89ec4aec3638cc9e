"""Recorded episodes replayed through a policy: what it would have done, beside what was done.

At every ``every``-th frame of an episode the policy is given what was recorded, and the actions of its chunk
stand beside those of the frames that follow. Nothing moves, so that an error has no consequences: the numbers
say how far a policy is from its demonstrations and a compressed one from its original, not whether the task
would be done (`sqap.evaluation`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sqap.frames.recordings import Demonstrations, Recording
from sqap.policy import Policy
from sqap.pruning.memory import Memory


@dataclass(frozen=True)
class Replayed:
    """One episode, replayed.

    Args:
        episode: its number.
        looks: frames at which the policy acted.
        recorded: what the robot was told, ``(frames, action_dim)``.
        actions: what the policy would have told it.
    """

    episode: int
    looks: tuple[int, ...]
    recorded: np.ndarray
    actions: np.ndarray


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


@dataclass(frozen=True)
class Comparison:
    """One policy's replayed episodes, or two policies' of the same.

    Args:
        names: of an action's dimensions.
        spread: standard deviation of the recorded actions, for each dimension.
        errors: policy -> its error from what was recorded; of two policies also ``"difference"``.
        episodes: for each, its number, frames, steps, and every policy's error.
    """

    names: tuple[str, ...]
    spread: tuple[float, ...]
    errors: Mapping[str, Deviation]
    episodes: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, acted: Mapping[str, Sequence[Replayed]], names: tuple[str, ...]) -> Comparison:
        """Compare what at most two policies, by their labels, have made of the same episodes."""
        first, *_ = acted.values()
        recorded = [one.recorded for one in first]
        actions = {label: [one.actions for one in each] for label, each in acted.items()}
        errors = {label: deviation(found, recorded) for label, found in actions.items()}
        if len(acted) == 2:
            errors["difference"] = deviation(*actions.values())
        episodes = tuple(
            {
                "episode": one.episode,
                "frames": len(one.recorded),
                "steps": len(one.looks),
                "errors": {
                    label: asdict(deviation([found[i]], [one.recorded])) for label, found in actions.items()
                },
            }
            for i, one in enumerate(first)
        )
        together = np.concatenate(recorded)
        moves = np.ptp(together, axis=0) > 0  # rounding alone would give what rests a spread
        return cls(names, tuple(np.where(moves, together.std(0), 0).tolist()), errors, episodes)

    @property
    def relative(self) -> dict[str, float | None]:
        """Errors over all dimensions, in units of each one's spread."""
        return {name: relative(error, self.spread) for name, error in self.errors.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"relative": self.relative}


def executed(policy: Policy) -> int:
    """How many actions of a chunk are executed before the policy looks again."""
    return policy.config.n_action_steps or policy.config.model.head.horizon


def act(
    policy: Policy,
    demonstrations: Demonstrations,
    every: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Replayed]:
    """Replay all episodes through a policy, which looks at every ``every``-th frame.

    The seed of a step's noise is the frame's number in the dataset, so that two policies have the same.

    Args:
        policy: whose chunks reach from each look to the next.
        demonstrations: the episodes, of which one is in memory at a time.
        every: at most the chunk's length.
        progress: gets (steps so far, steps in all).

    Raises:
        InputError: the dataset is incomplete, or the policy does not read such observations.
        NonFiniteActionError: its actions would not be finite.
    """
    total = sum(-(-episode.length // every) for episode in demonstrations.episodes)
    done = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), total)

    return [_act(policy, demonstrations.read(one, every), tick) for one in demonstrations.episodes]


def _act(policy: Policy, recording: Recording, tick: Callable[[], None]) -> Replayed:
    chunks: list[np.ndarray] = []
    memory: Memory | None = None
    ends = [*recording.looks[1:], len(recording.actions)]
    for frame, end, seen in zip(recording.looks, ends, recording.observations, strict=True):
        step = policy.step(seen, seed=recording.first + frame, memory=memory)
        memory = step.memory
        chunks.append(step.chunk[: end - frame])
        tick()
    return Replayed(recording.episode, recording.looks, recording.actions, np.concatenate(chunks))


def deviation(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> Deviation:
    """Compare actions of episodes, each ``(frames, action_dim)``, over all their frames."""
    difference = np.abs(np.concatenate([*found]).astype(np.float64) - np.concatenate([*expected]))
    return Deviation(
        tuple(difference.mean(0).tolist()),
        tuple(np.sqrt((difference**2).mean(0)).tolist()),
        tuple(difference.max(0).tolist()),
    )


def relative(error: Deviation, spread: Sequence[float]) -> float | None:
    """Root mean square error in units of a dimension's spread, over the dimensions that move at all.

    None if none does.
    """
    shares = [rms / each for rms, each in zip(error.rms, spread, strict=True) if each > 0]
    return float(np.sqrt(np.mean(np.square(shares)))) if shares else None
