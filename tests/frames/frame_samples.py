"""Pictures that tell who they are, and a small LeRobotDataset v3 of them as LeRobot writes it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIDE, BLOCK = 64, 16
CAMERA_BITS = 3
H264 = ("libx264", {"g": "12", "bf": "2", "crf": "18", "preset": "ultrafast"})
AV1 = ("libsvtav1", {"g": "2", "crf": "30", "preset": "12"})


def draw(number: int) -> np.ndarray:
    """A picture whose 4 x 4 black and white blocks are the bits of ``number``; survives lossy video."""
    bits = np.array([number >> i & 1 for i in range(16)], np.uint8).reshape(4, 4)
    return np.kron(bits * 255, np.ones((BLOCK, BLOCK), np.uint8))[..., None].repeat(3, axis=2)


def identify(image: np.ndarray) -> int:
    """The number that `draw` drew."""
    blocks = image.reshape(4, BLOCK, 4, BLOCK, 3).mean(axis=(1, 3, 4)).ravel()
    return sum(1 << i for i, value in enumerate(blocks) if value > 127)


def picture_number(camera: int, index: int) -> int:
    """What is drawn for frame ``index`` of the dataset by its ``camera``-th camera."""
    return (index << CAMERA_BITS) + camera + 1


def write_video(
    path: Path, numbers: Sequence[int], fps: int = 10, codec: tuple[str, dict[str, str]] = H264
) -> Path:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec[0], fps, options=codec[1])
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in numbers:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(number), format="rgb24")))
        container.mux(stream.encode())
    return path


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_dataset(
    root: Path,
    cameras: Mapping[str, str],
    lengths: Sequence[int] = (5, 8, 3),
    *,
    per_file: int = 2,
    fps: int = 10,
    tasks: Sequence[str] = ("open the drawer", "close the drawer"),
    task_column: str = "task",
    state: Callable[[int], Any] | None = lambda index: [float(index), 0.5],
    state_key: str = "observation.state",
    action: Callable[[int], list[float]] | None = None,
    action_names: Any = None,
    codec: tuple[str, dict[str, str]] = H264,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Episodes of ``lengths`` frames, ``per_file`` of them per parquet and video file.

    Args:
        root: where to write.
        cameras: key -> "video" or "image".
        state: of a frame, by its number in the dataset; None for a dataset without states.
        state_key: its column.
        action: of a frame, likewise; None for a dataset without actions.
        action_names: of its dimensions, as ``info.json`` has them.
        info: entries of ``info.json`` to write instead of the right ones.
    """
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    starts = np.cumsum([0, *lengths]).tolist()
    episodes = []
    for first in range(0, len(lengths), per_file):
        members = range(first, min(first + per_file, len(lengths)))
        file = first // per_file
        data = root / f"data/chunk-000/file-{file:03d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        tables = [
            pa.table(_rows(cameras, e, starts[e], lengths[e], fps, len(tasks), state, state_key, action))
            for e in members
        ]
        with pq.ParquetWriter(data, tables[0].schema) as writer:
            for table in tables:  # one row group per episode
                writer.write_table(table)
        for camera, (key, kind) in enumerate(cameras.items()):
            if kind == "video":
                numbers = [
                    picture_number(camera, i) for i in range(starts[members[0]], starts[members[-1] + 1])
                ]
                write_video(root / f"videos/{key}/chunk-000/file-{file:03d}.mp4", numbers, fps, codec)
        for e in members:
            seconds = {
                f"videos/{key}/{name}": value
                for key, kind in cameras.items()
                if kind == "video"
                for name, value in (
                    ("chunk_index", 0),
                    ("file_index", file),
                    ("from_timestamp", (starts[e] - starts[first]) / fps),
                    ("to_timestamp", (starts[e + 1] - starts[first]) / fps),
                )
            }
            episodes.append(
                {
                    "episode_index": e,
                    "tasks": [tasks[e % len(tasks)]],
                    "length": lengths[e],
                    "data/chunk_index": 0,
                    "data/file_index": file,
                    "dataset_from_index": starts[e],
                    "dataset_to_index": starts[e + 1],
                    **seconds,
                    "stats/timestamp/count": [lengths[e]],
                    "meta/episodes/chunk_index": 0,
                    "meta/episodes/file_index": 0,
                }
            )
    meta = root / "meta/episodes/chunk-000"
    meta.mkdir(parents=True)
    if episodes:
        pq.write_table(pa.Table.from_pylist(episodes), meta / "file-000.parquet")
    table = pa.table({"task_index": list(range(len(tasks))), task_column: list(tasks)})
    pq.write_table(table, root / "meta/tasks.parquet")
    numbers: dict[str, Any] = {}
    if state is not None:
        numbers[state_key] = {"dtype": "float32", "shape": [2], "names": ["x", "y"]}
    if action is not None:
        numbers["action"] = {"dtype": "float32", "shape": [len(action(0))], "names": action_names}
    _write_info(root, cameras, lengths, fps, len(tasks), numbers, info or {})
    return root


def _rows(
    cameras: Mapping[str, str],
    episode: int,
    start: int,
    length: int,
    fps: int,
    tasks: int,
    state: Any,
    state_key: str,
    action: Callable[[int], list[float]] | None,
) -> dict[str, Any]:
    pa = pytest.importorskip("pyarrow")
    frames = range(length)
    rows: dict[str, Any] = {}
    if state is not None:
        states = [state(start + i) for i in frames]
        kind = pa.list_(pa.float32(), len(state(0))) if isinstance(state(0), list) else pa.float32()
        rows[state_key] = pa.array(states, kind)
    if action is not None:
        rows["action"] = pa.array([action(start + i) for i in frames], pa.list_(pa.float32()))
    for camera, (key, stored) in enumerate(cameras.items()):
        if stored == "image":
            rows[key] = [
                {"bytes": png(draw(picture_number(camera, start + i))), "path": f"frame-{i:06d}.png"}
                for i in frames
            ]
    return rows | {
        "timestamp": pa.array([i / fps for i in frames], pa.float32()),
        "frame_index": list(frames),
        "episode_index": [episode] * length,
        "index": [start + i for i in frames],
        "task_index": [episode % tasks] * length,
    }


def _write_info(
    root: Path,
    cameras: Mapping[str, str],
    lengths: Sequence[int],
    fps: int,
    tasks: int,
    numbers: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> None:
    features: dict[str, Any] = {
        key: {"dtype": kind, "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]}
        for key, kind in cameras.items()
    }
    features |= numbers
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        dtype = "float32" if name == "timestamp" else "int64"
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    info = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": tasks,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info | dict(changes), indent=4))
