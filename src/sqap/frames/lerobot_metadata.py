"""What a LeRobotDataset v3 says of itself under ``meta``, in the layout of ``lerobot.datasets``.

``info.json`` has the features and the path templates, ``tasks.parquet`` the instructions, and
``episodes/*/*.parquet`` where each episode's rows and its stretches of video are; episodes share files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqap.errors import InputError
from sqap.frames.parquet import column_names, read_rows
from sqap.frames.paths import inside, listed
from sqap.observation import CAMERA_PREFIXES, short_name
from sqap.serialization import read_json

INFO = Path("meta", "info.json")
TASKS = Path("meta", "tasks.parquet")
EPISODES = Path("meta", "episodes")
STATE, ACTION = "observation.state", "action"
# pandas writes the instructions, which are the index of the table of tasks, under either name.
_TASK_COLUMNS = ("task", "__index_level_0__")
_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
# LeRobot's converters, and the releases that have them.
_TO_V21 = (
    "to v2.1, on the hub, with `python -m lerobot.datasets.v21.convert_dataset_v20_to_v21 "
    "--repo-id=ORG/NAME` of LeRobot 0.3.3"
)
_TO_V30 = (
    "to v3.0 with `python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=ORG/NAME --root={root} "
    "--push-to-hub=false` of LeRobot 0.5.1 or newer"
)
_CONVERTERS = {"v2.0": (_TO_V21, _TO_V30), "v2.1": (_TO_V30,)}


@dataclass(frozen=True)
class Info:
    """``meta/info.json``.

    Args:
        root: the dataset's directory.
        fps: frames per second.
        features: column or camera -> its ``dtype`` and more; a camera's dtype is "image" or "video".
        data_path: template of the parquet files, relative to ``root``.
        video_path: template of the videos; None if there are none.
    """

    root: Path
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    video_path: str | None

    def is_video(self, key: str) -> bool:
        """Whether a camera's pictures are in videos rather than in the rows."""
        return bool(self.features[key].get("dtype") == "video")

    def columns(self) -> list[str]:
        """The keys that hold numbers of the robot."""
        return [
            key
            for key, feature in self.features.items()
            if str(feature.get("dtype")).startswith(("float", "int")) and key not in _BOOKKEEPING
        ]

    def cameras(self) -> list[str]:
        """The keys that hold colour pictures."""
        return [
            key
            for key, feature in self.features.items()
            if feature.get("dtype") in ("image", "video") and not _is_depth(feature)
        ]


@dataclass(frozen=True)
class RecordedEpisode:
    """One row of ``meta/episodes``.

    Args:
        index: its number.
        length: in frames.
        first: the dataset-wide number of its first frame.
        data: the file with its rows.
        videos: camera key -> its file, and where in it the episode starts, in seconds.
    """

    index: int
    length: int
    first: int
    data: Path
    videos: Mapping[str, tuple[Path, float]]


def read_info(root: Path) -> Info:
    """Read ``meta/info.json``.

    Raises:
        InputError: it is unreadable, malformed, or of a version other than 3.
    """
    path = root / INFO
    data = read_json(path, InputError)
    version = data.get("codebase_version") if isinstance(data, dict) else None
    if not isinstance(version, str):
        raise InputError(f"{path} names no codebase_version, as a LeRobotDataset's does")
    if not version.startswith("v3."):
        steps = ", then ".join(_CONVERTERS.get(version, ())).format(root=root)
        raise InputError(
            f"{root} is a LeRobotDataset {version}, and v3.0 is read here"
            + (f": convert it with LeRobot's own scripts: {steps}" if steps else "")
        )
    features, fps = data.get("features"), data.get("fps")
    if not isinstance(features, dict) or not all(isinstance(value, dict) for value in features.values()):
        raise InputError(f"{path} must have features, an object of objects")
    data_path, video_path = data.get("data_path"), data.get("video_path")
    with_videos = any(feature.get("dtype") == "video" for feature in features.values())
    if not isinstance(data_path, str) or (with_videos and not isinstance(video_path, str)):
        raise InputError(f"{path} must have the templates data_path and, with videos, video_path")
    rate = number(fps, f"{path}: fps")
    if rate <= 0:
        raise InputError(f"{path}: fps must be positive, got {fps}")
    return Info(root, rate, features, data_path, video_path)


def camera_keys(info: Info, cameras: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Camera of the policy -> key of the dataset. Both may be given by their short names.

    Raises:
        InputError: the dataset has no such camera, or ``mapping`` one that the policy does not read.
    """
    for camera in mapping:
        if camera not in {*cameras, *map(short_name, cameras)}:
            raise InputError(f"the policy has no camera {camera!r} to map; it reads {', '.join(cameras)}")
    known = info.cameras()
    keys = {}
    for camera in cameras:
        name = mapping.get(camera, mapping.get(short_name(camera), camera))
        matches = [key for key in (name, *(prefix + name for prefix in CAMERA_PREFIXES)) if key in known]
        if not matches:
            raise InputError(
                f"the policy's cameras are {', '.join(cameras)}, mapped by --camera POLICY_CAMERA="
                f"DATASET_KEY, and {info.root} has no camera {name!r}"
                + (f" to use as the policy's {camera!r}" if name != camera else ", which the policy reads")
                + f"; its cameras are {', '.join(known) or 'none'}"
            )
        keys[camera] = matches[0]
    return keys


def state_key(info: Info, name: str | None, needed: bool) -> str | None:
    """The dataset's key of the robot's state: ``name``, or else `STATE` if it is there.

    Raises:
        InputError: the dataset has no ``name``; or no `STATE`, which is ``needed``.
    """
    wanted = STATE if name is None else name
    known = info.columns()
    matches = [key for key in (wanted, f"observation.{wanted}") if key in known]
    if matches:
        return matches[0]
    if name is None and not needed:
        return None
    raise InputError(
        f"{info.root} has no state {wanted!r}"
        + (", which the policy reads" if needed else "")
        + f"; --state names its key, and the dataset's columns of numbers are {', '.join(known) or 'none'}"
    )


def read_episodes(info: Info, video_keys: Iterable[str]) -> list[RecordedEpisode]:
    """Every episode, by number; of the videos only those of ``video_keys``.

    Raises:
        InputError: a file is unreadable, lacks a column, or holds something else than numbers.
    """
    video_keys = tuple(video_keys)
    columns = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
    for key in video_keys:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    episodes = []
    chunks = listed(info.root / EPISODES)
    for path in sorted(file for chunk in chunks for file in listed(chunk) if file.suffix == ".parquet"):
        for row in read_rows(path, columns):
            numbers = {name: number(value, f"{path}: {name}") for name, value in row.items()}
            episodes.append(_episode(info, numbers, video_keys))
    return sorted(episodes, key=lambda episode: episode.index)


def read_tasks(info: Info) -> dict[int, str]:
    """Number of a task -> its instruction.

    Raises:
        InputError: ``meta/tasks.parquet`` is unreadable or has no column of instructions.
    """
    path = info.root / TASKS
    names = column_names(path)
    text = next((column for column in _TASK_COLUMNS if column in names), _TASK_COLUMNS[0])
    return {row["task_index"]: row[text] for row in read_rows(path, ["task_index", text])}


def _episode(info: Info, row: Mapping[str, float], video_keys: Sequence[str]) -> RecordedEpisode:
    def file(template: str, prefix: str, **names: str) -> Path:
        chunk, place = int(row[f"{prefix}/chunk_index"]), int(row[f"{prefix}/file_index"])
        try:
            path = template.format(chunk_index=chunk, file_index=place, **names)
        except (LookupError, ValueError, AttributeError) as error:
            raise InputError(f"{info.root / INFO}: {template!r} is no template of a path") from error
        return inside(info.root, path, str(info.root / INFO))

    videos = {
        key: (
            file(info.video_path or "", f"videos/{key}", video_key=key),
            row[f"videos/{key}/from_timestamp"],
        )
        for key in video_keys
    }
    return RecordedEpisode(
        index=int(row["episode_index"]),
        length=int(row["length"]),
        first=int(row["dataset_from_index"]),
        data=file(info.data_path, "data"),
        videos=videos,
    )


def number(value: Any, where: str) -> float:
    """``value``, or an `InputError` if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where} must be a number, got {value!r}")
    return value


def _is_depth(feature: Mapping[str, Any]) -> bool:
    """Depth maps carry one of three marks, by the version of LeRobot that wrote them."""
    return any(
        isinstance(feature.get(place), dict) and feature[place].get(mark)
        for place, mark in (
            ("info", "is_depth_map"),
            ("info", "video.is_depth_map"),
            ("video_info", "video.is_depth_map"),
        )
    )
