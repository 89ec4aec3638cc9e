"""Image steps: from a camera's picture to what a vision encoder is given.

A list of steps turns a uint8 image ``(height, width, 3)`` into float32 ``(size, size, 3)``. Every step also
says which part of its input its output shows (`Window`), so that a point of the picture can be followed
through the list, and a visual token back to the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sqap.errors import InputError

Shape = tuple[int, int]  # height and width
Pair = tuple[float, float]  # along the width and along the height
Triple = tuple[float, float, float]
Values = Literal["bytes", "floats"]
HALVES = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Window:
    """A rectangle by its centre and sides, as shares of an image's sides; with padding it is the larger."""

    center: Pair = (0.5, 0.5)
    sides: Pair = (1.0, 1.0)

    def into(self, point: Pair) -> Pair:
        """Coordinates ``(u, v)`` in the image to those in the window; they may lie outside."""
        u, v = (0.5 + (p - c) / s for p, c, s in zip(point, self.center, self.sides, strict=True))
        return u, v

    def out_of(self, point: Pair) -> Pair:
        """The inverse of `into`."""
        u, v = (c + (p - 0.5) * s for p, c, s in zip(point, self.center, self.sides, strict=True))
        return u, v

    def inside(self, outer: Window) -> Window:
        """This window of the part that ``outer`` shows, as one of the whole image."""
        width, height = (a * b for a, b in zip(self.sides, outer.sides, strict=True))
        return Window(outer.out_of(self.center), (width, height))


WHOLE = Window()


class _ImageStep:
    reads: ClassVar[Values] = "floats"
    gives: ClassVar[Values] = "floats"

    def view(self, shape: Shape) -> tuple[Window, Shape]:
        """What the output shows of an input of that shape, and the output's shape."""
        return WHOLE, shape


@dataclass(frozen=True)
class Stretch(_ImageStep):
    """Resizes to a square, whatever the sides' ratio: by PIL's bicubic, as OpenVLA's processor does.

    Raises:
        InputError: the size is not positive.
    """

    size: int
    kind: Literal["stretch"] = "stretch"
    reads: ClassVar[Values] = "bytes"
    gives: ClassVar[Values] = "bytes"

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def view(self, shape: Shape) -> tuple[Window, Shape]:
        return WHOLE, (self.size, self.size)


@dataclass(frozen=True)
class Crop(_ImageStep):
    """The central ``area`` of an image, a share, enlarged to the image's size.

    Bilinear between pixel centres, corner on corner, as TensorFlow's ``crop_and_resize``: what policies that
    were trained on random crops are shown at work (OpenVLA's fine-tuned ones, OpenVLA-OFT).

    Raises:
        InputError: the area is no share.
    """

    area: float
    kind: Literal["crop"] = "crop"
    reads: ClassVar[Values] = "bytes"
    gives: ClassVar[Values] = "bytes"

    def __post_init__(self) -> None:
        if not 0 < self.area <= 1:
            raise InputError(f"the area must be in (0, 1], got {self.area}")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        single = np.float32
        (top, bottom, down), (left, right, along) = (self._places(size) for size in image.shape[:2])
        pixels = image.astype(single) * single(1 / 255)
        columns = pixels[:, left] + (pixels[:, right] - pixels[:, left]) * along[:, None]
        both = columns[top] + (columns[bottom] - columns[top]) * down[:, None, None]
        out: np.ndarray = (both * single(255.5)).astype(np.uint8)
        return out

    def _places(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Along one side: the pixels below and above each place, and how far it is from the lower one."""
        # In 32 bits and in TensorFlow's order of operations, so that the bytes are the same.
        single, last = np.float32, np.float32(size - 1)
        side = np.sqrt(single(self.area))
        start = (1 - side) / single(2)  # of the part, as a share of the image
        step = (start + side - start) * last / max(last, single(1))
        places = start * last + np.arange(size, dtype=single) * step
        below, above = np.floor(places).astype(int), np.ceil(places).astype(int)
        return below, above, places - below.astype(single)

    def view(self, shape: Shape) -> tuple[Window, Shape]:
        side = self.area**0.5
        return Window(sides=(side, side)), shape


@dataclass(frozen=True)
class Scale(_ImageStep):
    """Bytes to [0, 1]."""

    kind: Literal["scale"] = "scale"
    reads: ClassVar[Values] = "bytes"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = image.astype(np.float32) / np.float32(255)
        return scaled


@dataclass(frozen=True)
class ResizeWithPad(_ImageStep):
    """Resizes into a square, keeping the sides' ratio, and fills the rest with ``value``, as LeRobot does.

    The image of values in [0, 1] is interpolated without antialiasing, at half-pixel centres.

    Args:
        size: of the square.
        place: where the image is in it: padded above and on the left (SmolVLA), or on both sides, with
            the odd pixel below and on the right (pi0).
        value: of the padding.
        interpolation: between pixels.

    Raises:
        InputError: the size is not positive.
    """

    size: int
    place: Literal["bottom_right", "center"]
    value: float = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    kind: Literal["resize_with_pad"] = "resize_with_pad"

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        (height, width), (top, left) = self._box(image.shape[0], image.shape[1])
        planes = torch.from_numpy(image).permute(2, 0, 1)[None]
        small = F.interpolate(planes, (height, width), mode=self.interpolation, align_corners=False)
        out = np.full((self.size, self.size, 3), self.value, dtype=np.float32)
        out[top : top + height, left : left + width] = small[0].permute(1, 2, 0).clamp(0, 1).numpy()
        return out

    def _box(self, height: int, width: int) -> tuple[Shape, Shape]:
        """The resized image's shape, and where its upper left corner is."""
        ratio = max(width / self.size, height / self.size)
        shape = max(1, int(height / ratio)), max(1, int(width / ratio))
        top, left = (self.size - length for length in shape)
        return shape, (top // 2, left // 2) if self.place == "center" else (top, left)

    def view(self, shape: Shape) -> tuple[Window, Shape]:
        (height, width), (top, left) = self._box(*shape)
        center = (self.size / 2 - left) / width, (self.size / 2 - top) / height
        return Window(center, (self.size / width, self.size / height)), (self.size, self.size)


@dataclass(frozen=True)
class Normalize(_ImageStep):
    """Subtracts each channel's mean and divides by its deviation.

    Raises:
        InputError: a deviation is not positive.
    """

    mean: Triple = HALVES
    std: Triple = HALVES
    kind: Literal["normalize"] = "normalize"

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise InputError(f"std must be positive, got {list(self.std)}")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        mean, std = (np.array(values, dtype=np.float32) for values in (self.mean, self.std))
        normalized: np.ndarray = (image - mean) / std
        return normalized


ImageStep = Stretch | Crop | Scale | ResizeWithPad | Normalize
ImageSteps = tuple[ImageStep, ...]


def stretched(size: int, mean: Triple = HALVES, std: Triple = HALVES) -> ImageSteps:
    """The steps of Prismatic's policies: stretched, then normalised."""
    return Stretch(size), Scale(), Normalize(mean, std)


def cropped(steps: ImageSteps, area: float) -> ImageSteps:
    """The steps with another crop, of that area, as the last one of bytes; an area of 1 is no crop."""
    others = [step for step in steps if not isinstance(step, Crop)]
    place = next(i for i, step in enumerate(others) if step.gives == "floats")
    return (*others[:place], *((Crop(area),) if area < 1 else ()), *others[place:])


def pixel_values(image: np.ndarray, steps: Sequence[ImageStep]) -> Tensor:
    """A uint8 image ``(H, W, 3)`` to what its encoder is given, ``(1, 3, size, size)``."""
    with np.errstate(all="ignore"):  # actions that are not finite are refused in the end
        for step in steps:
            image = step(image)
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]


def window(steps: Sequence[ImageStep], shape: Shape) -> Window:
    """The part of a picture of that shape that is left behind the steps."""
    seen = WHOLE
    for step in steps:
        inner, shape = step.view(shape)
        seen = inner.inside(seen)
    return seen


def image_problems(steps: Sequence[ImageStep], size: int) -> Iterator[str]:
    """Why the steps do not make of bytes the square image of an encoder, if they do not."""
    given: Values = "bytes"
    for i, step in enumerate(steps):
        if step.reads != given:
            yield f"[{i}]: {step.kind!r} reads {step.reads}, and what is before it gives {given}"
        given = step.gives
    if given == "bytes":
        yield " must make floats of bytes, by 'scale'"
    sizes = [step.size for step in steps if isinstance(step, Stretch | ResizeWithPad)]
    if sizes[-1:] != [size]:
        yield f" must resize to {size}, the image_size of the vision encoder"


def _check_size(size: int) -> None:
    if size < 1:
        raise InputError(f"the size must be at least 1, got {size}")
