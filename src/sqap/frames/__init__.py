"""Calibration frames: what the policy sees at work, from a simulator, a directory of images or a dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sqap import environments
from sqap.errors import InputError
from sqap.frames.directory import read_directory
from sqap.frames.lerobot import read_dataset
from sqap.frames.lerobot_metadata import INFO
from sqap.frames.paths import is_directory, is_file
from sqap.frames.simulator import collect_frames
from sqap.observation import Observation
from sqap.policy import Policy

__all__ = ["collect_frames", "read_dataset", "read_directory", "read_frames"]


def read_frames(
    source: str | Path,
    policy: Policy,
    count: int,
    *,
    cameras: Mapping[str, str] | None = None,
    state: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Observation]:
    """Observations to calibrate ``policy`` on. Reading twice gives the same ones.

    Args:
        source: a simulator's name (``"metaworld"``), in which the policy then acts, or a directory: a
            LeRobotDataset v3 where there is a ``meta/info.json``, images with a ``metadata.jsonl`` otherwise.
            A `Path` is a directory whatever its name.
        policy: whose cameras are read.
        count: how many frames at most, evenly spread over what there is.
        cameras: for a LeRobotDataset, the key of the dataset's camera to use for a camera of the policy;
            without an entry it is the one of the same name.
        state: for a LeRobotDataset, the key of the robot's state; ``observation.state`` if not given.
        progress: gets (frames so far, frames in all).

    Raises:
        InputError: the source is neither, cannot be read, holds no frames or malformed ones, or lacks a
            camera or the state that the policy reads.
    """
    if count < 1:
        raise InputError(f"at least one calibration frame is needed, got a count of {count}")
    if isinstance(source, str) and environments.is_environment(source):
        if cameras or state:
            raise InputError(
                f"{source} gives the policy's own cameras and state; only a LeRobotDataset's are mapped"
            )
        return collect_frames(policy, source, environments.default_tasks(source), count, progress)
    root = Path(source)
    if not is_directory(root):
        raise InputError(
            f"no calibration frames at {source}: give a directory of images, a LeRobotDataset, "
            "or the name of a simulator, such as metaworld"
        )
    if is_file(root / INFO):
        reads_state = policy.config.state is not None
        return read_dataset(
            root, policy.config.cameras, count, cameras, progress, state=state, reads_state=reads_state
        )
    if cameras or state:
        raise InputError(
            f"{root} has no meta/info.json; only the cameras and the state of a LeRobotDataset are mapped"
        )
    return read_directory(root, policy.config.cameras, count, progress)
