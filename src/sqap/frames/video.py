"""Single frames out of long videos, with PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sqap.errors import InputError
from sqap.frames.extra import import_extra

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream


def frames_at(path: Path, times: Sequence[float], fps: float) -> Iterator[np.ndarray]:
    """The frames that ``path`` shows at ``times``, each uint8 ``(height, width, 3)`` RGB.

    Seeks to the key frame before each time and decodes from there, so no more than a few frames are in
    memory however long the video is.

    Args:
        path: a video.
        times: seconds from the video's start, in any order.
        fps: frames per second. A frame further than half a frame's time from the one asked for is another.

    Raises:
        InputError: PyAV is missing, the video cannot be decoded, or it has no frame at such a time.
    """
    av = import_extra("av")
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing")
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no video")
            stream = container.streams.video[0]
            for time in times:
                yield _nearest(container, stream, time, 0.5 / fps, path).to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot decode {path}: {getattr(error, 'strerror', None) or error}") from error


def _nearest(
    container: InputContainer, stream: VideoStream, time: float, tolerance: float, path: Path
) -> VideoFrame:
    assert stream.time_base is not None  # a video stream in an open file has one
    best, best_time = None, 0.0
    container.seek(round(time / stream.time_base), stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        shown = float(frame.pts * stream.time_base)
        if best is None or abs(shown - time) < abs(best_time - time):
            best, best_time = frame, shown
        if shown >= time:
            break
    if best is None or abs(best_time - time) > tolerance:
        found = "none" if best is None else f"the nearest is at {best_time:.3f} s"
        raise InputError(
            f"{path} has no frame at {time:.3f} s, where the dataset's metadata has one ({found}); "
            "the video is cut short or does not belong to this metadata"
        )
    return best
