"""One picture of several clips side by side, with what the pruner does drawn in (`sqap.report.overlay`)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sqap.pruning.selector import Selection
from sqap.report.clips import Clip, Frame
from sqap.report.overlay import AROUND, ATTENDED, SAMPLED, annotate, heat_map

PANE = 512  # pixels along a side of the camera image as it is shown

BACKGROUND, INK, FAINT_INK = (19, 22, 27), (242, 244, 247), (160, 168, 180)
SUCCESS, FAILURE = (0, 124, 90), (190, 78, 0)  # dark enough for white text
LEGEND = (
    ("ranked highest", "top", ATTENDED),
    ("near gripper", "ring", AROUND),
    ("sampled", "sampled", SAMPLED),
)
PRUNED_SWATCH = (58, 63, 71)

Font = ImageFont.FreeTypeFont


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
