"""From what a file holds to an `Observation`, with the place in every message."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sqap.errors import InputError
from sqap.observation import Observation

# A camera's picture is one of these; Pillow's rarer decoders are not offered a stranger's bytes.
_FORMATS = ("PNG", "JPEG", "WEBP")
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def decode_image(source: Path | bytes, where: str) -> np.ndarray:
    """A PNG, JPEG or WebP, as uint8 ``(height, width, 3)`` RGB, turned upright as its EXIF data says.

    Args:
        source: the file, or its bytes.
        where: names it in messages.

    Raises:
        InputError: it is missing, corrupt, of another format, too large, or has more than 8 bits per channel.
    """
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS
        ) as image:
            if image.mode not in _EIGHT_BIT_MODES:
                raise InputError(f"{where} has pixels of mode {image.mode}; 8 bits per channel are expected")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        sizes = re.findall(r"\d+", str(error))
        raise InputError(
            f"cannot read {where}: the image is too large"
            + (f", {sizes[0]} pixels where {sizes[1]} are the limit" if len(sizes) == 2 else "")
        ) from error
    # What Pillow raises for broken data depends on where it breaks.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        reason = getattr(error, "strerror", None) or "it is corrupt, or no PNG, JPEG or WebP"
        raise InputError(f"cannot read {where}: {reason}") from error


def observe(where: str, images: Mapping[str, np.ndarray], instruction: Any, state: Any) -> Observation:
    """An `Observation`; if it is not one, the message says ``where`` it came from.

    Raises:
        InputError: the instruction is missing, or the state is not a vector of finite numbers.
    """
    try:
        return Observation(images, instruction, state)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
