"""From a picture to pixels, to the bit where the authors' pipelines are known to the bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sqap.errors import InputError
from sqap.processing import (
    Crop,
    ImageSteps,
    Normalize,
    ResizeWithPad,
    Scale,
    Stretch,
    Window,
    cropped,
    image_problems,
    pixel_values,
    stretched,
    window,
)

SHAPES = [(48, 80), (32, 80), (80, 32), (20, 24), (7, 5), (300, 2)]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "area", "sha256"),
    [
        (224, 0.9, "5492e6ce731613b4"),
        (224, 0.5, "9a01d9e6b03288c5"),
        (56, 0.9, "25fdbec0d9a739d2"),
        (56, 0.5, "f32d4d5b9c4d58a1"),
        (17, 0.9, "4d1a05dcfe32d036"),
    ],
)
def test_a_central_crop_is_tensorflows(size: int, area: float, sha256: str) -> None:
    """Bytes of TensorFlow 2.21's crop_and_resize on the same noise, as OpenVLA's evaluation calls it."""
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    cut = Crop(area)(image)
    assert cut.shape == (size, size, 3)
    assert hashlib.sha256(cut.tobytes()).hexdigest().startswith(sha256)


def test_a_crop_of_a_rectangle_is_cut_along_each_side() -> None:
    """A picture that does not vary along one side is cropped as if it were the square of the other."""
    for axis in (0, 1):
        line = noise(24, 1) if axis == 0 else noise(1, 24)
        square, wide = (line.repeat(n, 1 - axis) for n in (24, 40))
        assert np.array_equal(Crop(0.6)(wide).take(0, 1 - axis), Crop(0.6)(square).take(0, 1 - axis))
    assert np.array_equal(Crop(0.6)(noise(1, 1)), noise(1, 1))


@pytest.mark.parametrize("level", [0, 255])
def test_the_ends_of_the_range_survive_a_crop(level: int) -> None:
    image = np.full((17, 17, 3), level, dtype=np.uint8)
    assert np.array_equal(Crop(0.7)(image), image)


def test_pixels_are_of_the_crop() -> None:
    image, steps = noise(32, 32), stretched(32)
    part = pixel_values(image, cropped(steps, 0.9))
    assert torch.equal(part, pixel_values(Crop(0.9)(image), steps))
    assert not torch.equal(part, pixel_values(image, steps))


def test_a_crop_takes_the_place_of_another() -> None:
    steps = cropped(stretched(32), 0.9)
    assert steps == (Stretch(32), Crop(0.9), Scale(), Normalize())
    assert cropped(steps, 0.5) == (Stretch(32), Crop(0.5), Scale(), Normalize())
    assert cropped(steps, 1.0) == stretched(32)
    padded = Scale(), ResizeWithPad(32, "center")
    assert cropped(padded, 0.5) == (Crop(0.5), *padded)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_is_stretched_by_pil(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    expected = np.array(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(Stretch(32)(image), expected)


@pytest.mark.parametrize("shape", [(48, 80), (32, 80), (80, 32), (20, 24)])
def test_images_of_another_size_are_resized_as_pil_does(shape: tuple[int, int]) -> None:
    """PyTorch's antialiased bicubic is PIL's, but for rounding between its two passes."""
    # Levels that no pass overshoots.
    image = np.random.default_rng(0).integers(64, 192, (*shape, 3), dtype=np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(planes, (32, 32), mode="bicubic", antialias=True).clamp(0, 255)
    levels = (pixel_values(image, stretched(32)) + 1) / 2 * 255
    assert levels.shape == (1, 3, 32, 32)
    assert (levels - resized).abs().max() < 2


def test_pixels_are_normalised_by_channel() -> None:
    image = np.full((8, 8, 3), (255, 51, 0), dtype=np.uint8)
    pixels = pixel_values(image, stretched(8, (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)))
    assert pixels.dtype == torch.float32
    expected = torch.tensor([1.8, 0.0, -1.5]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(pixels, expected, rtol=1e-6, atol=1e-7)


def test_steps_are_pytorchs_arithmetic_to_the_bit() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = noise(40, 40)
    planes = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1).div_(255)
    expected = planes.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
    found = pixel_values(image, stretched(40, mean, std))
    assert torch.equal(found[0], expected)
    assert found.stride()[1:] == expected.stride()  # by which a convolution's sums are ordered


def linear(size: int, places: np.ndarray) -> np.ndarray:
    """Weights ``(places, size)`` of bilinear interpolation."""
    return np.maximum(0, 1 - np.abs(np.clip(places, 0, size - 1)[:, None] - np.arange(size)))


def cubic(size: int, places: np.ndarray) -> np.ndarray:
    """Weights ``(places, size)`` of bicubic interpolation with a = -0.75; pixels go on at the borders."""
    weights = np.zeros((len(places), size))
    for row, place in enumerate(places):
        for pixel in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x = abs(place - pixel)
            if x <= 1:
                weight = 1.25 * x**3 - 2.25 * x**2 + 1
            else:
                weight = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(pixel, 0), size - 1)] += weight
    return weights


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", ["bottom_right", "center"])
@pytest.mark.parametrize(("interpolation", "weights"), [("bilinear", linear), ("bicubic", cubic)])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_padding_is_lerobots(shape, place, interpolation, weights, value) -> None:
    """``resize_with_pad``: scaled by the larger ratio, at half-pixel centres, without antialiasing."""
    size, (height, width) = 32, shape
    ratio = max(width / size, height / size)
    rows, columns = max(int(height / ratio), 1), max(int(width / ratio), 1)
    down, along = (
        weights(old, (np.arange(new) + 0.5) * old / new - 0.5)
        for old, new in ((height, rows), (width, columns))
    )
    image = noise(*shape)
    small = np.einsum("ih,jw,hwc->ijc", down, along, image / 255).clip(0, 1)
    above, left = size - rows, size - columns
    if place == "center":
        above, left = above // 2, left // 2
    expected = np.full((size, size, 3), value)
    expected[above : above + rows, left : left + columns] = small
    found = ResizeWithPad(size, place, value, interpolation)(Scale()(image))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bars_are_where_the_policies_were_shown_them() -> None:
    """480 x 640: 128 rows above for SmolVLA at 512, 28 above and below for pi0 at 224."""
    image = np.full((480, 640, 3), 255, dtype=np.uint8)
    smol = pixel_values(image, (Scale(), ResizeWithPad(512, "bottom_right"), Normalize()))[0, 0]
    assert (smol[:128] == -1).all()
    assert (smol[128:] == 1).all()
    pi = pixel_values(image, (Scale(), ResizeWithPad(224, "center"), Normalize()))[0, 0]
    assert (pi[:28] == -1).all()
    assert (pi[28:196] > 0.999).all()
    assert (pi[196:] == -1).all()


@pytest.mark.parametrize("place", ["bottom_right", "center"])
def test_an_odd_bar_is_below_and_on_the_right(place) -> None:
    found = ResizeWithPad(5, place)(np.ones((2, 5, 3), dtype=np.float32))
    first = {"bottom_right": 3, "center": 1}[place]
    assert [int(row[0, 0]) for row in found] == [int(first <= i < first + 2) for i in range(5)]


def test_a_square_that_fits_is_only_normalised() -> None:
    image = noise(32, 32)
    assert np.array_equal(ResizeWithPad(32, "center")(Scale()(image)), Scale()(image))


def test_a_crop_is_the_centre_by_its_share_of_the_area() -> None:
    def crop(area: float) -> Window:
        return window(cropped(stretched(32), area), (48, 64))

    assert crop(0.25).into((0.25, 0.75)) == pytest.approx((0, 1))  # half of each side
    assert crop(0.9).into((0.5, 0.5)) == pytest.approx((0.5, 0.5))
    assert crop(0.5).into((0.9, 0.5))[0] == pytest.approx(1.0657, abs=1e-4)  # out of the crop
    assert crop(1.0).into((0.1, 0.7)) == pytest.approx((0.1, 0.7))
    assert crop(0.6).out_of(crop(0.6).into((0.3, 0.8))) == pytest.approx((0.3, 0.8))


def test_padding_moves_and_shrinks() -> None:
    """A 4:3 picture's upper edge is a quarter below the square's."""
    seen = window((Scale(), ResizeWithPad(32, "bottom_right")), (48, 64))
    assert seen.into((0.5, 0.0)) == (0.5, 0.25)
    assert seen.into((1.0, 1.0)) == (1.0, 1.0)
    assert seen.out_of((0.5, 0.25)) == (0.5, 0.0)
    assert window((ResizeWithPad(32, "center"),), (48, 64)).into((0.0, 0.0)) == (0.0, 0.125)
    assert window((ResizeWithPad(32, "center"),), (64, 48)).into((0.0, 0.0)) == (0.125, 0.0)


PLACED: dict[str, ImageSteps] = {
    "stretched": stretched(48),
    "cropped": cropped(stretched(48), 0.6),
    "below": (Scale(), ResizeWithPad(48, "bottom_right")),
    "centred": (Scale(), ResizeWithPad(48, "center")),
    "cropped, then padded": (Crop(0.6), Scale(), ResizeWithPad(48, "bottom_right")),
    "cropped, stretched, cropped": (Crop(0.8), Stretch(48), Crop(0.7), Scale()),
    "padded twice": (Scale(), ResizeWithPad(40, "center"), ResizeWithPad(48, "bottom_right")),
}


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (150, 150)])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.42, 0.6), (0.62, 0.45)])
def test_a_point_is_where_its_dot_is_seen(name, shape, place) -> None:
    (height, width), (u, v) = shape, place
    rows, columns = (np.arange(n) + 0.5 for n in shape)
    dot = np.hypot((rows / height - v)[:, None], columns / width - u) < 0.08
    image = np.repeat(dot[..., None] * np.uint8(255), 3, axis=2)
    seen = pixel_values(image, PLACED[name])[0, 0].double()
    seen = (seen - seen.min()).numpy()
    places = (np.arange(48) + 0.5) / 48
    shown = [(seen.sum(axis) * places).sum() / seen.sum() for axis in (0, 1)]
    assert window(PLACED[name], shape).into(place) == pytest.approx(shown, abs=0.3 / 48)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        (
            (Stretch(32), Normalize(), Scale()),
            "[1]: 'normalize' reads floats, and what is before it gives bytes",
        ),
        ((Scale(), Stretch(32), Scale()), "[1]: 'stretch' reads bytes, and what is before it gives floats"),
        ((Stretch(32), Crop(0.9)), " must make floats of bytes, by 'scale'"),
        ((Scale(),), " must resize to 32, the image_size of the vision encoder"),
        ((Stretch(32), Stretch(31), Scale()), " must resize to 32, the image_size of the vision encoder"),
    ],
)
def test_a_list_that_makes_no_pixels_is_refused(steps: ImageSteps, problem: str) -> None:
    assert problem in list(image_problems(steps, 32))


def test_lists_that_make_pixels_are_not() -> None:
    for steps in (*PLACED.values(), stretched(48)):
        assert list(image_problems(steps, 48)) == []


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Stretch(0), "the size must be at least 1, got 0"),
        (lambda: ResizeWithPad(0, "center"), "the size must be at least 1, got 0"),
        (lambda: Crop(0.0), r"the area must be in \(0, 1\], got 0.0"),
        (lambda: Crop(1.1), r"the area must be in \(0, 1\], got 1.1"),
        (lambda: Normalize(std=(0.5, 0.0, 0.5)), r"std must be positive, got \[0.5, 0.0, 0.5\]"),
    ],
)
def test_steps_that_cannot_be_are_refused(make, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()
