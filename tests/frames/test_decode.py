"""Image files to pixels."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from sqap.errors import InputError
from sqap.frames.decode import decode_image, observe

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_exactly(form, options, tmp_path):
    data = encode(Image.fromarray(RGB), form, **options)
    (tmp_path / "image").write_bytes(data)
    for source in (data, tmp_path / "image"):
        image = decode_image(source, "it")
        assert image.dtype == np.uint8
        assert np.array_equal(image, RGB)


def test_jpeg_comes_back_nearly():
    flat = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    image = decode_image(encode(Image.fromarray(flat), "JPEG", quality=95), "it")
    assert np.abs(image.astype(int) - flat).max() <= 3


def test_gray_palettes_and_transparency_become_rgb():
    gray = decode_image(encode(Image.fromarray(RGB[..., 0])), "it")
    assert np.array_equal(gray, RGB[..., :1].repeat(3, axis=2))
    alpha = np.concatenate([RGB, np.full((6, 8, 1), 7, np.uint8)], axis=2)
    assert np.array_equal(decode_image(encode(Image.fromarray(alpha)), "it"), RGB)
    palette = Image.fromarray(RGB).quantize(4)
    assert np.array_equal(decode_image(encode(palette), "it"), np.asarray(palette.convert("RGB")))


def test_a_picture_taken_sideways_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise
    image = decode_image(encode(Image.fromarray(RGB), exif=exif), "it")
    assert np.array_equal(image, np.rot90(RGB, -1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"cannot read cam\.png: it is corrupt, or no PNG, JPEG or WebP"),
        (b"hello", "it is corrupt"),
        (encode(Image.fromarray(RGB))[:60], "it is corrupt"),
        (encode(Image.fromarray(RGB), "JPEG")[:-100], "it is corrupt"),
        (encode(Image.fromarray(RGB), "GIF"), "no PNG, JPEG or WebP"),
        (encode(Image.fromarray(RGB[..., 0].astype(np.uint16))), r"pixels of mode I;16.*8 bits per channel"),
    ],
)
def test_what_cannot_be_read_is_refused(data, message):
    with pytest.raises(InputError, match=message) as caught:
        decode_image(data, "cam.png")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read cam\.png: No such file"):
        decode_image(tmp_path / "cam.png", "cam.png")


def test_an_image_that_is_too_large_is_not_called_corrupt(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(InputError, match="cam: the image is too large, 48 pixels where 40 are the limit"):
        decode_image(encode(Image.fromarray(RGB)), "cam")


def test_every_broken_byte_is_an_input_error_or_a_picture():
    """Never another exception, wherever the file is damaged."""
    rng = np.random.default_rng(1)
    for form in ("PNG", "JPEG", "WEBP"):
        whole = encode(Image.fromarray(RGB), form)
        for _ in range(200):
            data = bytearray(whole)
            data[rng.integers(len(data))] = rng.integers(256)
            with contextlib.suppress(InputError):
                assert decode_image(bytes(data), "it").shape[2] == 3


def test_the_place_is_in_the_message():
    with pytest.raises(InputError, match=r"line 3: state\[1\] is nan"):
        observe("line 3", {"front": RGB}, "go", [0.0, float("nan")])
