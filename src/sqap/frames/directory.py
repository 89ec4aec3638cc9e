"""Frames from a directory of images, laid out as Hugging Face's ``imagefolder`` is.

``metadata.jsonl`` has one JSON object per frame: ``file_name`` (or one ``<camera>_file_name`` per camera),
``instruction``, and, if the policy reads it, ``state``. Other keys are the user's own. The order of the lines
is the order of the frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqap.errors import InputError
from sqap.frames.decode import decode_image, observe
from sqap.frames.paths import inside
from sqap.frames.selection import spread
from sqap.observation import Observation, short_name

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class _Frame:
    where: str
    files: dict[str, Path]
    instruction: Any
    state: Any

    def read(self) -> Observation:
        images = {camera: decode_image(path, str(path)) for camera, path in self.files.items()}
        return observe(self.where, images, self.instruction, self.state)


def read_directory(
    root: Path,
    cameras: Sequence[str],
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Observation]:
    """At most ``count`` of the frames that ``root/metadata.jsonl`` lists, evenly spread, in its order.

    Args:
        root: the directory.
        cameras: the policy's, whose images are under ``<camera>_file_name``, by its name or its short one;
            ``file_name`` alone means its only one.
        count: how many frames at most; only these images are opened.
        progress: gets (frames so far, frames in all).

    Raises:
        InputError: the list is missing, empty or malformed, or a frame lacks a camera or an instruction,
            names a file outside ``root``, has an image that cannot be read or a state that is not finite.
    """
    frames = _listed(root, cameras)
    chosen = [frames[i] for i in spread(len(frames), count)]
    observations = []
    for frame in chosen:
        observations.append(frame.read())
        if progress is not None:
            progress(len(observations), len(chosen))
    return observations


def _listed(root: Path, cameras: Sequence[str]) -> list[_Frame]:
    path = root / METADATA
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(
            f"{root} is no LeRobotDataset (it has no meta/info.json) and no directory of images: it has no "
            f'{METADATA} with a line such as {{"file_name": "0001.png", "instruction": "..."}} per frame'
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text; byte {error.start} is not") from error
    frames = [
        _frame(root, line, f"{path}, line {number}", cameras)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not frames:
        raise InputError(f"{path} lists no frames")
    return frames


def _frame(root: Path, line: str, where: str, cameras: Sequence[str]) -> _Frame:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where} must be a JSON object, got {type(record).__name__}")
    instruction = record.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise InputError(f"{where} has no instruction; say under 'instruction' what the robot should do")
    files = {camera: _file(root, record, camera, where, len(cameras) == 1) for camera in cameras}
    return _Frame(where, files, instruction, record.get("state"))


def _file(root: Path, record: dict[str, Any], camera: str, where: str, only: bool) -> Path:
    own, name = f"{camera}_file_name", None
    for key in dict.fromkeys((own, f"{short_name(camera)}_file_name", *(["file_name"] if only else []))):
        name = record.get(key, name)
        if name is not None:
            break
    if name is None:
        listed = sorted(key for key in record if key == "file_name" or key.endswith("_file_name"))
        raise InputError(
            f"{where} has no image of the policy's camera {camera!r}: it needs {own!r}"
            + (" or 'file_name'" if only else "")
            + f", and has {', '.join(map(repr, listed)) or 'neither'}"
        )
    return inside(root, name, where)
