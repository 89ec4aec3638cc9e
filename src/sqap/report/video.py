"""Rollout videos, policies side by side, and single pictures of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sqap.errors import InputError
from sqap.files import whole_file
from sqap.report.clips import FPS, Clip
from sqap.report.panes import PANE, compose

HOLD_SECONDS = 0.7  # how long the end of an episode stays in the picture


def write_video(
    path: str | Path, columns: Sequence[Sequence[Clip]], fps: float = FPS, pane: int = PANE
) -> None:
    """Write episodes to an MP4 file that every browser plays, in real time; whole or not at all.

    Args:
        path: replaced if it exists.
        columns: one a policy, left to right; each holds the same episodes, shown one after the other.
        fps: frames per simulated second.
        pane: pixels along a side of each camera image.

    Raises:
        InputError: the name does not end in .mp4, the file cannot be written, or imageio is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"a video is written as MP4: its name must end in .mp4, got {path.name!r}")
    imageio, imageio_ffmpeg = _import_imageio()
    rows = list(zip(*columns, strict=True))
    with whole_file(path) as temporary:
        writer = imageio.get_writer(
            temporary,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=None,
            macro_block_size=2,
            # The index goes first, so that a browser can start before it has the whole file.
            output_params=["-crf", "20", "-movflags", "+faststart"],
        )
        written = 0
        # imageio's own context manager leaves ffmpeg running after an error.
        with closing(writer):
            for row in rows:
                for seconds in _times(row, fps):
                    writer.append_data(compose(row, seconds, pane))
                    written += 1
        # imageio does not look at how ffmpeg ended, e.g. for want of disk space.
        if imageio_ffmpeg.count_frames_and_secs(str(temporary))[0] != written:
            raise OSError("the encoder did not finish it")


def write_picture(path: str | Path, frame: np.ndarray) -> None:
    """Write ``frame`` ``(H, W, 3)`` uint8 as a PNG file, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    with whole_file(Path(path)) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG", optimize=True)


def _times(row: Sequence[Clip], fps: float) -> Iterator[float]:
    """The moments to show: until the longest episode is over, and `HOLD_SECONDS` more."""
    longest = max(clip.seconds for clip in row)
    for index in range(ceil(longest * fps - 1e-6) + round(HOLD_SECONDS * fps) + 1):
        yield index / fps


def _import_imageio() -> tuple[Any, Any]:
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:  # the latter: no ffmpeg for this machine
        raise InputError(f'videos need imageio and ffmpeg ({error}); pip install "sqap[sim]"') from error
    return imageio, imageio_ffmpeg
