"""Rollout videos, policies side by side, in which one sees what the pruner does (`sqap.report.overlay`).

Everything is drawn when it is written, so that a recorded episode is no larger than its camera images.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sqap.environments import ControlUnits, Environment
from sqap.errors import InputError
from sqap.evaluation.rollout import Actor, Episode, run_episode
from sqap.files import whole_file
from sqap.observation import Observation
from sqap.processing import ImageSteps, Window, window
from sqap.pruning.selector import Selection
from sqap.report.overlay import AROUND, ATTENDED, SAMPLED, annotate, heat_map

FPS = 20
PANE = 512  # pixels along a side of the camera image as it is shown
HOLD_SECONDS = 0.7  # how long the end of an episode stays in the picture

BACKGROUND, INK, FAINT_INK = (19, 22, 27), (242, 244, 247), (160, 168, 180)
SUCCESS, FAILURE = (0, 124, 90), (190, 78, 0)  # dark enough for white text
LEGEND = (
    ("ranked highest", "top", ATTENDED),
    ("near gripper", "ring", AROUND),
    ("sampled", "sampled", SAMPLED),
)
PRUNED_SWATCH = (58, 63, 71)

Font = ImageFont.FreeTypeFont


class Frame(NamedTuple):
    """One moment of an episode: what is seen, the visual tokens in use, the control steps done so far."""

    observation: Observation
    selection: Selection | None
    step: int


@dataclass(frozen=True, eq=False)
class Clip:
    """One recorded episode.

    Args:
        label: what to call the policy.
        ring: inner and outer radius of its protected ring, as shares of a side of what the policy looks at;
            None draws none.
        hz: control steps per simulated second.
        frames: ascending in time, from the first moment to the last.
        episode: how it went.
        camera: whose images are shown, those that the selections are of; None for the observation's first.
        steps: what the policy does to an image; None of them shows it all.
    """

    label: str
    ring: tuple[float, float] | None
    hz: float
    frames: tuple[Frame, ...]
    episode: Episode
    camera: str | None = None
    steps: ImageSteps = ()

    @property
    def ranked(self) -> bool:
        """Whether there are scores to show beside the kept tokens."""
        return any(
            frame.selection is not None and frame.selection.scores is not None for frame in self.frames
        )

    @property
    def seconds(self) -> float:
        """Simulated time until the end."""
        return self.episode.steps / self.hz

    def image(self, frame: Frame) -> np.ndarray:
        """The camera image ``(H, W, 3)`` that is shown of a frame."""
        images = frame.observation.images
        return next(iter(images.values())) if self.camera is None else images[self.camera]

    def window(self, frame: Frame) -> Window:
        """The part of its camera image that the policy looks at."""
        height, width = self.image(frame).shape[:2]
        return window(self.steps, (height, width))

    def at(self, seconds: float) -> Frame:
        """The latest frame not after ``seconds`` of simulated time."""
        # The tiny addition is for 4.1 s at 30 Hz, which in floating point is less than 123 steps.
        after = bisect_right(self.frames, seconds * self.hz + 1e-6, key=lambda frame: frame.step)
        return self.frames[max(after - 1, 0)]


def record_episode(
    policy: Actor,
    env: Environment,
    seed: int,
    *,
    label: str,
    ring: tuple[float, float] | None,
    units: ControlUnits,
    camera: str | None = None,
    steps: ImageSteps = (),
) -> Clip:
    """Run one episode as `evaluation.run_episode` does, and keep `FPS` frames a simulated second.

    Args:
        policy: what acts.
        env: left open.
        seed: of the episode.
        label: what to call the policy in the picture.
        ring: radii of the policy's protected ring, as shares of a side of what the policy looks at; None if
            it has none.
        units: of the environment's actions; tells how long a control step is.
        camera: whose images are shown, the policy's first; None for the environment's first.
        steps: what the policy does to an image.

    Raises:
        InputError: as `run_episode`.
    """
    stride = max(1, round(units.hz / FPS))
    frames: list[Frame] = []

    def watch(observation: Observation, selection: Selection | None, step: int) -> None:
        if frames and frames[-1].step % stride:
            frames.pop()  # only the last frame of all may be off the beat
        frames.append(Frame(observation, selection, step))

    episode = run_episode(policy, env, seed, units=units, watch=watch)
    return Clip(label, ring, units.hz, tuple(frames), episode, camera, steps)


def compose(clips: Sequence[Clip], seconds: float, pane: int = PANE) -> np.ndarray:
    """One picture of several episodes side by side, ``seconds`` of simulated time after their start.

    Where tokens are ranked, their scores are shown on the right of what is kept.

    Args:
        clips: from left to right.
        seconds: an episode that is over by then shows its end.
        pane: pixels along a side of each camera image.

    Returns:
        ``(height, width, 3)`` uint8, both sides even, as video encoders want.
    """
    margin = pane // 20
    panes = []
    for clip in clips:
        panes.append(_draw_pane(clip, seconds, pane))
        if clip.ranked:
            panes.append(_draw_scores(clip, seconds, pane))
    width, height = (2 * ceil(side / 2) for side in (margin + len(panes) * (pane + margin), panes[0].height))
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    for column, drawn in enumerate(panes):
        canvas.paste(drawn, (margin + column * (pane + margin), 0))
    return np.array(canvas)


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


def _draw_pane(clip: Clip, seconds: float, size: int) -> Image.Image:
    """One clip's camera image between a header and a legend."""
    frame = clip.at(seconds)
    header, footer = size * 84 // 512, size * 48 // 512
    canvas = Image.new("RGB", (size, header + size + footer), BACKGROUND)
    shown = annotate(clip.image(frame), frame.selection, size, clip.ring, clip.window(frame))
    canvas.paste(Image.fromarray(shown), (0, header))
    draw = ImageDraw.Draw(canvas)
    _draw_header(draw, clip, frame, size, header)
    _draw_legend(draw, frame.selection, header + size + footer / 2, _font(size * 18 / 512))
    return canvas


def _draw_scores(clip: Clip, seconds: float, size: int) -> Image.Image:
    """What the clip's tokens are ranked by, below a headline."""
    selection, image = clip.at(seconds).selection, clip.image(clip.at(seconds))
    header, footer = size * 84 // 512, size * 48 // 512
    canvas = Image.new("RGB", (size, header + size + footer), BACKGROUND)
    scores = None if selection is None else selection.scores
    if scores is not None:
        shown = heat_map(image, scores.float().numpy(), size, clip.window(clip.at(seconds)))
        canvas.paste(Image.fromarray(shown), (0, header))
    draw = ImageDraw.Draw(canvas)
    draw.text((0, header * 0.33), "what it goes by", INK, _font(size * 26 / 512), anchor="lm")
    text = "the attention that tokens are ranked by"
    draw.text((0, header * 0.74), text, FAINT_INK, _font(size * 19 / 512), anchor="lm")
    return canvas


def _draw_header(draw: ImageDraw.ImageDraw, clip: Clip, frame: Frame, width: int, height: int) -> None:
    large, small = _font(width * 26 / 512), _font(width * 19 / 512)
    first, second = height * 0.33, height * 0.74
    # What stands on the right comes and grows: the left keeps clear of it from the start, and never moves.
    label = _fit(clip.label, large, 0.6 * width)
    instruction = _fit(frame.observation.instruction, small, 0.66 * width)
    draw.text((0, first), label, INK, large, anchor="lm")
    draw.text((0, second), instruction, FAINT_INK, small, anchor="lm")
    counter = f"step {frame.step}  ·  {frame.step / clip.hz:.2f} s"
    draw.text((width, second), counter, FAINT_INK, small, anchor="rm")
    if frame is clip.frames[-1]:
        _draw_badge(draw, clip, width, first, small)


def _draw_badge(draw: ImageDraw.ImageDraw, clip: Clip, right: float, y: float, font: Font) -> None:
    """How the episode ended."""
    success = clip.episode.success
    text = f"success after {clip.seconds:.2f} s" if success else "failed"
    half = 0.8 * font.size
    left = right - font.getlength(text) - 2 * half
    box = (left, y - half, right - 1, y + half)
    draw.rounded_rectangle(box, radius=half / 2, fill=SUCCESS if success else FAILURE)
    draw.text(((left + right) / 2, y), text, INK, font, anchor="mm")


def _draw_legend(draw: ImageDraw.ImageDraw, selection: Selection | None, y: float, font: Font) -> None:
    """What the outlines mean that are in the picture."""
    if selection is None:
        draw.text((0, y), "all visual tokens used", FAINT_INK, font, anchor="lm")
        return
    x, side = 0.0, 0.8 * font.size
    present = [(name, color) for name, reason, color in LEGEND if getattr(selection, reason).any()]
    for name, color in (*present, ("pruned", None)):
        box = (x, y - side / 2, x + side, y + side / 2)
        draw.rectangle(box, fill=None if color else PRUNED_SWATCH, outline=color, width=2)
        draw.text((x + 1.5 * side, y), name, FAINT_INK, font, anchor="lm")
        x += 1.5 * side + font.getlength(name) + font.size


def _font(pixels: float) -> Font:
    font = ImageFont.load_default(pixels)
    assert isinstance(font, Font)  # the bitmap font is only for those who name no size
    return font


def _fit(text: str, font: Font, width: float) -> str:
    """``text`` on one line, its end cut off if it is longer than ``width`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda end: font.getlength(text[:end] + "…"))
    return text[: max(fitting - 1, 0)].rstrip() + "…"


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
