"""Episodes of a LeRobotDataset with the actions that were recorded in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqap.errors import InputError
from sqap.frames.lerobot import Moment, View, read_moments
from sqap.frames.lerobot_metadata import ACTION, INFO, Info, RecordedEpisode
from sqap.frames.paths import is_file
from sqap.frames.selection import spread
from sqap.observation import Observation

EPISODES = 5  # of a dataset, where none are named


@dataclass(frozen=True)
class Recording:
    """One episode as it was recorded.

    Args:
        episode: its number.
        first: the dataset-wide number of its first frame.
        actions: what the robot was told at each frame, ``(frames, action_dim)``, float64, in its own units.
        looks: frames at which a policy acts, in order.
        observations: what it sees there.
    """

    episode: int
    first: int
    actions: np.ndarray
    looks: tuple[int, ...]
    observations: tuple[Observation, ...]


@dataclass(frozen=True)
class Demonstrations:
    """Chosen episodes of a dataset, each to be read when it is needed.

    Args:
        view: the dataset as a policy reads it.
        action: the dataset's key of the actions.
        names: of an action's dimensions.
        episodes: those chosen.
    """

    view: View
    action: str
    names: tuple[str, ...]
    episodes: tuple[RecordedEpisode, ...]

    @classmethod
    def of(
        cls,
        root: Path,
        cameras: Sequence[str],
        action_dim: int,
        numbers: Sequence[int] | None = None,
        *,
        mapping: Mapping[str, str] | None = None,
        state: str | None = None,
        reads_state: bool = False,
        action: str | None = None,
    ) -> Demonstrations:
        """Look at what the dataset says of itself.

        Args:
            root: the dataset's directory.
            cameras: the policy's.
            action_dim: numbers of the policy's actions.
            numbers: of the episodes; `EPISODES` evenly spread ones if not given.
            mapping: camera of the policy -> the dataset's, where they are called differently.
            state: the dataset's key of the robot's state; ``observation.state`` if not given.
            reads_state: whether the policy needs the state.
            action: the dataset's key of the actions; ``action`` if not given.

        Raises:
            InputError: it is no LeRobotDataset v3, has no such episode, or lacks a camera, the state, or
                actions of as many numbers.
        """
        if not is_file(root / INFO):
            raise InputError(f"{root} is no LeRobotDataset: it has no {INFO}")
        view = View.of(root, cameras, mapping, state, reads_state)
        key = ACTION if action is None else action
        names = _names(view.info, key)
        if names is not None and len(names) != action_dim:
            raise InputError(
                f"{root}: {key} has {len(names)} numbers ({', '.join(names)}), and the policy's actions have "
                f"{action_dim}; --action names the key of another column"
            )
        names = names or tuple(f"{key} {i}" for i in range(action_dim))
        return cls(view, key, names, _chosen(root, view.episodes(), numbers))

    def read(self, episode: RecordedEpisode, every: int) -> Recording:
        """An episode, and what is seen at every ``every``-th frame of it.

        Raises:
            InputError: the dataset is incomplete or unreadable, or an action is not a vector of as many
                finite numbers.
        """
        moments = [Moment(episode, frame) for frame in range(episode.length)]
        rows = read_moments(moments, [self.action])
        each = zip(rows, moments, strict=True)
        actions = np.stack([self._action(row[self.action], moment) for row, moment in each])
        looks = moments[::every]
        seen = self.view.observe(looks)
        frames = tuple(moment.frame for moment in looks)
        return Recording(episode.index, episode.first, actions, frames, tuple(seen))

    def _action(self, value: Any, moment: Moment) -> np.ndarray:
        try:
            action = np.atleast_1d(np.array(value, np.float64))
        except (TypeError, ValueError):
            action = np.zeros(0)
        if action.shape != (len(self.names),) or not np.isfinite(action).all():
            raise InputError(
                f"{self.view.info.root}, {moment.where}: {self.action} must be {len(self.names)} finite "
                f"numbers, got {value!r}"
            )
        return action


def _names(info: Info, key: str) -> tuple[str, ...] | None:
    """Of the dimensions of a column of vectors; None if it does not say how many there are.

    Raises:
        InputError: there is no such column.
    """
    known = info.columns()
    if key not in known:
        raise InputError(
            f"{info.root} has no actions {key!r}; --action names their key, and the dataset's columns of "
            f"numbers are {', '.join(known) or 'none'}"
        )
    feature = info.features[key]
    names = feature.get("names")
    if isinstance(names, dict) and len(names) == 1:  # {"motors": [...]}, as older recorders write them
        (names,) = names.values()
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    shape = feature.get("shape")
    if isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int:
        return tuple(f"{key} {i}" for i in range(shape[0]))
    return None


def _chosen(
    root: Path, episodes: Sequence[RecordedEpisode], numbers: Sequence[int] | None
) -> tuple[RecordedEpisode, ...]:
    by_number = {episode.index: episode for episode in episodes if episode.length > 0}
    if not by_number:
        raise InputError(f"{root} holds no frames")
    if numbers is None:
        numbers = [[*by_number][i] for i in spread(len(by_number), EPISODES)]
    for number in numbers:
        if number not in by_number:
            raise InputError(
                f"{root} has no episode {number}; it has {len(by_number)}, numbered from {min(by_number)} to "
                f"{max(by_number)}"
            )
    return tuple(by_number[number] for number in dict.fromkeys(numbers))
