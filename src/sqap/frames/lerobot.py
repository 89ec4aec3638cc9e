"""Frames from a LeRobotDataset v3: rows in parquet files, pictures in mp4 files or in the rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqap.errors import InputError
from sqap.frames.decode import decode_image, observe
from sqap.frames.lerobot_metadata import (
    TASKS,
    Info,
    RecordedEpisode,
    camera_keys,
    number,
    read_episodes,
    read_info,
    read_tasks,
    state_key,
)
from sqap.frames.parquet import read_rows
from sqap.frames.selection import deal, looks
from sqap.frames.video import frames_at
from sqap.observation import Observation

_ROW = ("index", "episode_index", "frame_index", "timestamp", "task_index")


@dataclass(frozen=True)
class Moment:
    """One frame of one episode."""

    episode: RecordedEpisode
    frame: int

    @property
    def index(self) -> int:
        """Its number, counted through the whole dataset."""
        return self.episode.first + self.frame

    @property
    def place(self) -> tuple[int, int]:
        """The numbers of its episode and of the frame in it."""
        return self.episode.index, self.frame

    @property
    def where(self) -> str:
        """Its place in words."""
        return f"frame {self.frame} of episode {self.episode.index}"


@dataclass(frozen=True)
class View:
    """What a policy reads of a dataset.

    Args:
        info: the dataset's.
        cameras: camera of the policy -> key of the dataset.
        state: key of the robot's state; None if it is not there.
    """

    info: Info
    cameras: Mapping[str, str]
    state: str | None

    @classmethod
    def of(
        cls,
        root: Path,
        cameras: Sequence[str],
        mapping: Mapping[str, str] | None = None,
        state: str | None = None,
        reads_state: bool = False,
    ) -> View:
        """Look into ``meta/info.json``; the arguments are those of `read_dataset`.

        Raises:
            InputError: it is unreadable, of another version, or lacks a camera or the state.
        """
        info = read_info(root)
        return cls(info, camera_keys(info, cameras, mapping or {}), state_key(info, state, reads_state))

    def episodes(self) -> list[RecordedEpisode]:
        """Every episode, by number."""
        return read_episodes(self.info, filter(self.info.is_video, self.cameras.values()))

    def observe(
        self, moments: Sequence[Moment], progress: Callable[[int, int], None] | None = None
    ) -> list[Observation]:
        """What the policy sees at some moments; only their rows and video frames are decoded.

        Raises:
            InputError: the dataset is incomplete or unreadable, or lacks an instruction or a finite state.
        """
        stored = [key for key in self.cameras.values() if not self.info.is_video(key)]
        columns = list(dict.fromkeys(stored if self.state is None else [self.state, *stored]))
        rows, tasks = read_moments(moments, columns), read_tasks(self.info)
        images: list[dict[str, np.ndarray]] = [{} for _ in moments]
        done = 0
        for camera, key in self.cameras.items():
            filmed = self.info.is_video(key)
            pictures = _filmed(key, moments, rows, self.info.fps) if filmed else _stored(key, moments, rows)
            for i, image in pictures:
                images[i][camera] = image
                done += 1
                if progress is not None:
                    progress(done // len(self.cameras), len(moments))
        return [
            _observation(f"{self.info.root}, {moment.where}", row, image, tasks, self.state)
            for moment, row, image in zip(moments, rows, images, strict=True)
        ]


def read_dataset(
    root: Path,
    cameras: Sequence[str],
    count: int,
    mapping: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    state: str | None = None,
    reads_state: bool = False,
) -> list[Observation]:
    """At most ``count`` frames, evenly spread over the episodes and over the time in each, in their order.

    Args:
        root: the dataset's directory.
        cameras: the policy's. Camera ``c`` is the dataset's key ``c``, or else ``observation.images.c``.
        count: how many frames at most.
        mapping: camera of the policy -> the dataset's, where they are called differently.
        progress: gets (frames so far, frames in all).
        state: the dataset's key of the robot's state; ``observation.state`` if not given.
        reads_state: whether the policy needs the state; otherwise ``observation.state`` may be missing.

    Raises:
        InputError: the ``lerobot`` extra is not installed; the dataset is of another version, empty,
            incomplete or unreadable; or it lacks a camera, an instruction or a finite state.
    """
    view = View.of(root, cameras, mapping, state, reads_state)
    moments = _choose(view.episodes(), count)
    if not moments:
        raise InputError(f"{root} holds no frames")
    return view.observe(moments, progress)


def _choose(episodes: Sequence[RecordedEpisode], count: int) -> list[Moment]:
    shares = deal([episode.length for episode in episodes], count)
    return [
        Moment(episode, frame)
        for episode, share in zip(episodes, shares, strict=True)
        for frame in looks(episode.length, share, episode.index)
    ]


def read_moments(moments: Sequence[Moment], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The moments' rows, in their order: the given columns, and those that say where a row belongs.

    Raises:
        InputError: a file cannot be read, or a row is not where ``meta/episodes`` says.
    """
    by_file: dict[Path, list[int]] = defaultdict(list)
    for i, moment in enumerate(moments):
        by_file[moment.episode.data].append(i)
    rows: list[dict[str, Any]] = [{} for _ in moments]
    for path, members in by_file.items():
        wanted = {moments[i].index for i in members}
        found = {row["index"]: row for row in read_rows(path, [*_ROW, *columns], "index", wanted)}
        for i in members:
            rows[i] = found.get(moments[i].index, {})
            if (rows[i].get("episode_index"), rows[i].get("frame_index")) != moments[i].place:
                raise InputError(
                    f"{path} does not hold {moments[i].where} at index {moments[i].index}, "
                    "where meta/episodes says it is"
                )
    return rows


def _stored(
    key: str, moments: Sequence[Moment], rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, np.ndarray]]:
    """A camera's pictures out of the rows, each with the position of its moment."""
    for i, (moment, row) in enumerate(zip(moments, rows, strict=True)):
        file = row[key] if isinstance(row[key], dict) else {}
        yield i, decode_image(file.get("bytes") or b"", f"{key} in {moment.where} of {moment.episode.data}")


def _filmed(
    key: str, moments: Sequence[Moment], rows: Sequence[Mapping[str, Any]], fps: float
) -> Iterator[tuple[int, np.ndarray]]:
    """A camera's pictures out of its videos, each with the position of its moment; one video at a time."""
    times: dict[Path, dict[int, float]] = defaultdict(dict)
    for i, (moment, row) in enumerate(zip(moments, rows, strict=True)):
        path, start = moment.episode.videos[key]
        times[path][i] = start + number(row["timestamp"], f"timestamp of {moment.where}")
    for path, members in times.items():
        yield from zip(members, frames_at(path, list(members.values()), fps), strict=True)


def _observation(
    where: str,
    row: Mapping[str, Any],
    images: Mapping[str, np.ndarray],
    tasks: Mapping[int, str],
    state: str | None,
) -> Observation:
    if row["task_index"] not in tasks:
        raise InputError(f"{where}, has no instruction: {TASKS} has no task {row['task_index']}")
    # A state of a single number is stored without a list around it.
    vector = None if state is None else np.atleast_1d(row[state])
    return observe(where, images, tasks[row["task_index"]], vector)
