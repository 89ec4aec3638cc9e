"""Rollout videos, policies side by side, in which one sees what the pruner does.

Pruned patches are dark. Kept ones are left as they are, and an outline says by which criterion: orange
for the attention they receive, blue for being around the gripper, white for sampled. Everything is drawn
when it is written, so a recorded episode is no larger than its camera images.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sqap.environments import ActionUnits, Environment
from sqap.errors import InputError
from sqap.evaluation.rollout import Actor, Episode, run_episode
from sqap.observation import Observation
from sqap.pruning.selector import Selection

FPS = 20
PANE = 512  # pixels along a side of the camera image as it is shown
HOLD_SECONDS = 0.7  # how long the end of an episode stays in the picture

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont

# Okabe and Ito's palette, whose colors color-blind people tell apart; the darker badges carry white text.
ATTENDED, AROUND, SAMPLED = (230, 159, 0), (86, 180, 233), (245, 245, 245)
SUCCESS, FAILURE = (0, 124, 90), (190, 78, 0)
BACKGROUND, INK, FAINT_INK = (19, 22, 27), (242, 244, 247), (160, 168, 180)
PRUNED_SWATCH = (58, 63, 71)

PRUNED_BRIGHTNESS = 0.28
PRUNED_SATURATION = 0.3
OUTLINE_OPACITY = 0.7
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


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
        ring: inner and outer radius of its protected ring, as shares of the image's side; None draws none.
        hz: control steps per simulated second.
        frames: ascending in time, from the first moment to the last.
        episode: how it went.
    """

    label: str
    ring: tuple[float, float] | None
    hz: float
    frames: tuple[Frame, ...]
    episode: Episode

    @property
    def seconds(self) -> float:
        """Simulated time until the end."""
        return self.episode.steps / self.hz

    def at(self, seconds: float) -> Frame:
        """The latest frame not after ``seconds`` of simulated time."""
        # The tiny addition keeps 0.15 s * 40 Hz from being a step less than 6.
        after = bisect_right(self.frames, seconds * self.hz + 1e-6, key=lambda frame: frame.step)
        return self.frames[max(after - 1, 0)]


def record_episode(
    policy: Actor,
    env: Environment,
    seed: int,
    *,
    label: str,
    ring: tuple[float, float] | None,
    units: ActionUnits,
) -> Clip:
    """Run one episode as `evaluation.run_episode` does, and keep `FPS` frames a simulated second.

    Args:
        policy: what acts.
        env: left open; its first camera's images are shown.
        seed: of the episode.
        label: what to call the policy in the picture.
        ring: radii of the policy's protected ring, as shares of the image's side; None if it has none.
        units: of the environment's actions; tells how long a control step is.

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
    return Clip(label, ring, units.hz, tuple(frames), episode)


def annotate(
    image: np.ndarray,
    selection: Selection | None,
    grid: int,
    size: int,
    ring: tuple[float, float] | None,
) -> np.ndarray:
    """The camera image, enlarged, with what was pruned in the dark.

    Args:
        image: ``(H, W, 3)`` uint8.
        selection: of ``grid * grid`` visual tokens; None leaves the image as it is.
        grid: patches along a side.
        size: pixels along a side of the result.
        ring: inner and outer radius as shares of the image's side, drawn around the selection's target if
            that is known.

    Returns:
        ``(size, size, 3)`` uint8.
    """
    enlarged = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
    if selection is None:
        return np.array(enlarged)
    pixels = np.array(enlarged, dtype=np.float32)
    reason = _reasons(selection, grid, size)
    dark = PRUNED_BRIGHTNESS * (
        PRUNED_SATURATION * pixels + (1 - PRUNED_SATURATION) * (pixels @ _LUMA)[..., None]
    )
    pixels = np.where((reason == 0)[..., None], dark, pixels)
    outline = _outline(reason, width=max(1, size // 256))
    colors = np.array((BACKGROUND, ATTENDED, AROUND, SAMPLED))[reason]
    pixels = _blend(pixels, colors, OUTLINE_OPACITY * (outline & (reason > 0)))
    if ring is not None and selection.target is not None:
        pixels = _draw_ring(pixels, selection.target, ring)
    return pixels.round().astype(np.uint8)


def compose(clips: Sequence[Clip], seconds: float, pane: int = PANE) -> np.ndarray:
    """One picture of several episodes side by side, ``seconds`` of simulated time after their start.

    Args:
        clips: from left to right.
        seconds: an episode that is over by then shows its end.
        pane: pixels along a side of each camera image.

    Returns:
        ``(height, width, 3)`` uint8, both sides even, as video encoders want.
    """
    margin = pane // 32
    panes = [_draw_pane(clip, seconds, pane) for clip in clips]
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
    with _whole(path) as temporary:
        written = 0
        with imageio.get_writer(
            temporary,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=None,
            macro_block_size=2,
            # The index goes first, so that a browser can start before it has the whole file.
            output_params=["-crf", "20", "-movflags", "+faststart"],
        ) as writer:
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
    with _whole(Path(path)) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG", optimize=True)


def _reasons(selection: Selection, grid: int, size: int) -> np.ndarray:
    """``(size, size)`` int: why each pixel's patch was kept (1 attention, 2 ring, 3 sampled), 0 if not."""
    masks = (selection.top, selection.ring, selection.sampled)
    patches = sum(code * mask.numpy().astype(np.int64) for code, mask in enumerate(masks, start=1))
    patch_of = np.arange(size) * grid // size
    reasons: np.ndarray = np.reshape(patches, (grid, grid))[patch_of[:, None], patch_of]
    return reasons


def _outline(reason: np.ndarray, width: int) -> np.ndarray:
    """``(size, size)`` bool: pixels within ``width`` of a patch with another reason, or of the border."""
    size = len(reason)
    padded = np.pad(reason, width, constant_values=-1)
    outline = np.zeros(reason.shape, dtype=bool)
    for down in (0, width, 2 * width):
        for right in (0, width, 2 * width):
            outline |= padded[down : down + size, right : right + size] != reason
    return outline


def _draw_ring(pixels: np.ndarray, target: tuple[float, float], ring: tuple[float, float]) -> np.ndarray:
    """Both circles and a dot on the target, each with a dark rim that sets it off from any background."""
    size = len(pixels)
    stroke = size / 220
    centres = np.arange(size) + 0.5
    distance = np.hypot(centres - target[0] * size, (centres - target[1] * size)[:, None])
    from_line = np.minimum.reduce([abs(distance - radius * size) for radius in (0, *ring)])
    for color, width in ((BACKGROUND, 2 * stroke), (AROUND, stroke)):
        # How much of a pixel a line of this width covers: smooth edges without drawing at a larger size.
        pixels = _blend(pixels, np.array(color), np.clip(width / 2 + 0.5 - from_line, 0, 1))
    return pixels


def _blend(pixels: np.ndarray, color: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    blended: np.ndarray = pixels + np.float32(opacity)[..., None] * (np.float32(color) - pixels)
    return blended


def _draw_pane(clip: Clip, seconds: float, size: int) -> Image.Image:
    """One clip's camera image between a header and a legend."""
    frame = clip.at(seconds)
    grid = 1 if frame.selection is None else round(frame.selection.mask.numel() ** 0.5)
    header, footer = size * 84 // 512, size * 48 // 512
    canvas = Image.new("RGB", (size, header + size + footer), BACKGROUND)
    camera_image = next(iter(frame.observation.images.values()))
    image = annotate(camera_image, frame.selection, grid, size, clip.ring)
    canvas.paste(Image.fromarray(image), (0, header))
    draw = ImageDraw.Draw(canvas)
    large, small = _font(size * 26 / 512), _font(size * 19 / 512)
    first, second = header * 0.33, header * 0.74
    # The space for what stands on the right is kept free all the time, so that nothing moves.
    draw.text((0, first), _fit(clip.label, large, 0.62 * size), INK, large, anchor="lm")
    draw.text(
        (0, second), _fit(frame.observation.instruction, small, 0.66 * size), FAINT_INK, small, anchor="lm"
    )
    time = f"step {frame.step}  ·  {frame.step / clip.hz:.2f} s"
    draw.text((size, second), time, FAINT_INK, small, anchor="rm")
    if frame is clip.frames[-1]:
        _draw_badge(draw, clip, (size, first), small)
    _draw_legend(draw, frame.selection, (0, header + size + footer / 2), small)
    return canvas


def _font(pixels: float) -> Font:
    font = ImageFont.load_default(pixels)
    # Only a font asked for without a size can be the bitmap one, which older drawings relied on.
    assert isinstance(font, Font)
    return font


def _fit(text: str, font: Font, width: float) -> str:
    """``text`` on one line, its end cut off if it is longer than ``width`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    length = bisect_right(range(len(text)), width, key=lambda end: font.getlength(text[:end] + "…"))
    return text[: max(length - 1, 0)].rstrip() + "…"


def _draw_badge(draw: ImageDraw.ImageDraw, clip: Clip, right: tuple[float, float], font: Font) -> None:
    """How the episode ended, in a box that ends at ``right`` (x, y of its middle)."""
    text = f"success after {clip.seconds:.1f} s" if clip.episode.success else "failed"
    x, y = right
    half = font.size * 0.8
    left = x - font.getlength(text) - 2 * half
    color = SUCCESS if clip.episode.success else FAILURE
    draw.rounded_rectangle((left, y - half, x - 1, y + half), radius=half / 2, fill=color)
    draw.text(((left + x) / 2, y), text, INK, font, anchor="mm")


def _draw_legend(
    draw: ImageDraw.ImageDraw, selection: Selection | None, left: tuple[float, float], font: Font
) -> None:
    """What the outlines in this picture mean, starting at ``left`` (x, y of its middle)."""
    x, y = left
    if selection is None:
        draw.text((x, y), "every visual token is used", FAINT_INK, font, anchor="lm")
        return
    named = (
        ("most attended", ATTENDED, selection.top),
        ("near gripper", AROUND, selection.ring),
        ("sampled", SAMPLED, selection.sampled),
        ("pruned", None, ~selection.mask),
    )
    side = font.size * 0.75
    for name, color, tokens in named:
        if not tokens.any():
            continue
        box = (x, y - side / 2, x + side, y + side / 2)
        draw.rectangle(box, fill=None if color else PRUNED_SWATCH, outline=color, width=2)
        draw.text((x + 1.5 * side, y), name, FAINT_INK, font, anchor="lm")
        x += 1.5 * side + font.getlength(name) + 1.1 * font.size


def _times(row: Sequence[Clip], fps: float) -> Iterator[float]:
    """The moments to show: until the longest episode is over, and `HOLD_SECONDS` more."""
    longest = max(clip.seconds for clip in row)
    for index in range(ceil(longest * fps - 1e-6) + round(HOLD_SECONDS * fps) + 1):
        yield index / fps


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write next to ``path``, which takes its place if all goes well and is gone otherwise."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise InputError(f"cannot write {path}: {reason}; nothing there was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def _import_imageio() -> tuple[Any, Any]:
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:  # the latter: no ffmpeg for this machine
        raise InputError(f'videos need imageio and ffmpeg ({error}); pip install "sqap[sim]"') from error
    return imageio, imageio_ffmpeg
