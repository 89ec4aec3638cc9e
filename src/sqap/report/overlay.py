"""What the pruner did, drawn over the camera image, and what it went by.

Pruned patches are dark. Kept ones are left as they are, and an outline says by which criterion: orange
for their rank, blue for being near the gripper, white for sampled. What lies around a crop is darker still,
behind a thin gray frame. The scores that tokens are ranked by are a heat map of their own.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from sqap.processing import WHOLE, Window
from sqap.pruning.selector import Selection

# From Okabe and Ito's palette, whose colors color-blind people tell apart.
ATTENDED, AROUND, SAMPLED = (230, 159, 0), (86, 180, 233), (245, 245, 245)
RIM, FRAME = (19, 22, 27), (160, 168, 180)
UNSEEN = -1  # as the reason of a pixel outside the crop
_COLORS = np.array((RIM, ATTENDED, AROUND, SAMPLED, FRAME), dtype=np.float32)  # by reason, the frame's last

PRUNED_BRIGHTNESS = 0.28
PRUNED_SATURATION = 0.3
UNSEEN_BRIGHTNESS = 0.4  # of a pruned pixel's
# Of Matplotlib's inferno, whose lightness rises evenly.
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float32)
HEAT_OPACITY = 0.75
OUTLINE_OPACITY = 0.7
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def annotate(
    image: np.ndarray,
    selection: Selection | None,
    size: int,
    ring: tuple[float, float] | None,
    window: Window = WHOLE,
) -> np.ndarray:
    """The camera image, enlarged, with what was pruned in the dark.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        selection: None leaves the image as it is.
        size: pixels along a side of the result.
        ring: inner and outer radius as shares of the window's sides, drawn around the selection's target if
            that is known.
        window: the part of the image that the policy looks at; the grid covers it.

    Returns:
        ``(size, size, 3)`` uint8.
    """
    enlarged = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
    if selection is None:
        return np.array(enlarged)
    pixels = np.array(enlarged, dtype=np.float32)
    reason = _reasons(selection, size, window)
    gray = (pixels @ _LUMA)[..., None]
    dark = PRUNED_BRIGHTNESS * (gray + PRUNED_SATURATION * (pixels - gray))
    dark = np.where((reason == UNSEEN)[..., None], UNSEEN_BRIGHTNESS * dark, dark)
    pixels = np.where((reason <= 0)[..., None], dark, pixels)
    outline = _outline(reason, width=max(1, size // 256)) & (reason != 0)
    pixels = _blend(pixels, _COLORS[reason], OUTLINE_OPACITY * outline)
    if ring is not None and selection.target is not None:
        pixels = _draw_ring(pixels, selection.target, ring, window)
    return pixels.round().astype(np.uint8)


def heat_map(image: np.ndarray, scores: np.ndarray, size: int, window: Window = WHOLE) -> np.ndarray:
    """The camera image in gray, under the scores of its patches: black is none, yellow the highest.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        scores: ``(grid * grid,)``; the square root is shown, or all but the highest would be black. Patches
            that were gone already have -inf.
        size: pixels along a side of the result.
        window: the part of the image that the policy looks at; the grid covers it.

    Returns:
        ``(size, size, 3)`` uint8.
    """
    enlarged = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
    gray = np.repeat((np.array(enlarged, dtype=np.float32) @ _LUMA)[..., None], 3, axis=2)
    shown = np.maximum(scores, 0)
    shown = np.sqrt(shown / max(shown.max(), np.finfo(np.float32).tiny))
    stops = np.linspace(0, 1, len(_HEAT))
    colors = np.stack([np.interp(shown, stops, channel) for channel in _HEAT.T], axis=1)
    patches = _patches(np.arange(len(scores)), size, window)
    heat = np.where((patches == UNSEEN)[..., None], 0, colors[patches])
    pixels = gray + HEAT_OPACITY * (heat - gray)
    return np.asarray(pixels.round(), dtype=np.uint8)


def _reasons(selection: Selection, size: int, window: Window) -> np.ndarray:
    """``(size, size)`` int: why each pixel's patch was kept (1 its rank, 2 ring, 3 sampled), 0 if not.

    `UNSEEN` where there is no patch.
    """
    masks = (selection.top, selection.ring, selection.sampled)
    codes = sum(code * mask.numpy().astype(np.int64) for code, mask in enumerate(masks, start=1))
    return _patches(np.asarray(codes), size, window)


def _patches(values: np.ndarray, size: int, window: Window) -> np.ndarray:
    """``(size, size)``: the value ``(grid * grid,)`` of each pixel's patch; `UNSEEN` where there is none."""
    grid = round(len(values) ** 0.5)
    columns, rows = (
        np.clip(np.floor(along * grid).astype(np.int64), -1, grid) + 1 for along in _along(size, window)
    )
    padded = np.pad(np.reshape(values, (grid, grid)), 1, constant_values=UNSEEN)
    of_pixels: np.ndarray = padded[rows[:, None], columns]
    return of_pixels


def _along(size: int, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Centres of a picture's columns, and of its rows, as shares of the window's sides."""
    places = (np.arange(size) + 0.5) / size
    columns, rows = (0.5 + (places - c) / s for c, s in zip(window.center, window.sides, strict=True))
    return columns, rows


def _outline(reason: np.ndarray, width: int) -> np.ndarray:
    """``(size, size)`` bool: pixels within ``width`` of a patch with another reason, or of the border."""
    size = len(reason)
    padded = np.pad(reason, width, constant_values=-1)
    outline = np.zeros(reason.shape, dtype=bool)
    for down in (0, width, 2 * width):
        for right in (0, width, 2 * width):
            outline |= padded[down : down + size, right : right + size] != reason
    return outline


def _draw_ring(
    pixels: np.ndarray, target: tuple[float, float], ring: tuple[float, float], window: Window
) -> np.ndarray:
    """Both circles and a dot on the target, each with a dark rim that sets it off from any background.

    ``target`` and ``ring`` are shares of the window's sides.
    """
    size = len(pixels)
    stroke, side = size / 220, size * (window.sides[0] * window.sides[1]) ** 0.5
    columns, rows = _along(size, window)
    distance = side * np.hypot(columns - target[0], (rows - target[1])[:, None])
    from_line = np.minimum.reduce([abs(distance - radius * side) for radius in (0, *ring)])
    for color, width in ((RIM, 2 * stroke), (AROUND, stroke)):
        # How much of a pixel a line of this width covers: smooth edges without drawing at a larger size.
        pixels = _blend(pixels, np.array(color, dtype=np.float32), np.clip(width / 2 + 0.5 - from_line, 0, 1))
    return pixels


def _blend(pixels: np.ndarray, color: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """``pixels`` ``(size, size, 3)`` under ``color``, which covers the share ``opacity`` of each."""
    blended: np.ndarray = pixels + opacity.astype(np.float32)[..., None] * (color - pixels)
    return blended
