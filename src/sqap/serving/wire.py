"""MessagePack frames with NumPy arrays, as openpi's client and server exchange them.

An array is the map ``{b"__ndarray__": True, b"data": bytes, b"dtype": str, b"shape": [int, ...]}`` and a
NumPy scalar ``{b"__npgeneric__": True, b"data": number, b"dtype": str}`` (openpi-client 0.1.2,
``msgpack_numpy.py``). Nothing is pickled. `unpack` takes what a stranger sends: types, sizes and the number
of objects are bounded, so that what it makes is never much larger than the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgpack
import numpy as np

from sqap.errors import InputError

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
DATA, DTYPE, SHAPE = b"data", b"dtype", b"shape"
# Little-endian numbers; neither objects nor structures, strings or dates.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in ("|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")
}
MAX_CONTAINERS = 512  # maps and lists of one frame
MAX_ENTRIES = 128  # of one map or list
MAX_TEXT = 64 * 1024  # bytes of one string
MAX_AXES = 8


def pack(message: Mapping[str, Any]) -> bytes:
    """A frame.

    Args:
        message: strings, numbers, lists, maps with keys that are strings, and arrays or scalars of `DTYPES`.

    Raises:
        InputError: an array's type is none of `DTYPES`, or a value cannot be sent at all.
    """
    try:
        frame: bytes = msgpack.packb(message, default=_pack_numpy)
    except (TypeError, ValueError, OverflowError, RecursionError) as problem:
        raise InputError(f"this cannot be sent as MessagePack: {problem}") from problem
    return frame


def unpack(frame: bytes, *, containers: int = MAX_CONTAINERS, entries: int = MAX_ENTRIES) -> dict[str, Any]:
    """The message of a frame. Arrays are read-only views of the frame's bytes.

    Args:
        frame: what was received.
        containers: maps and lists that it may have.
        entries: that one of them may have.

    Raises:
        InputError: it is not one map in MessagePack, holds what no request or reply has (extensions, a key
            that is not a string or that is there twice, arrays of objects), or too many objects.
    """
    try:
        message = msgpack.unpackb(
            frame,
            object_pairs_hook=(count := _Count(containers)).of_map,
            list_hook=count.of_list,
            ext_hook=_refuse_extension,
            max_array_len=entries,
            max_map_len=entries,
            max_str_len=MAX_TEXT,
        )
    except InputError:
        raise
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as problem:
        raise InputError(f"the frame is not valid MessagePack: {_reason(problem)}") from problem
    if not isinstance(message, dict):
        raise InputError(f"a frame must be one map, got {type(message).__name__}")
    return message


class _Count:
    """The hooks of one frame, which count its maps and lists."""

    def __init__(self, most: int) -> None:
        self._left = self._most = most

    def of_list(self, values: list[Any]) -> list[Any]:
        self._add(values)
        return values

    def of_map(self, pairs: list[tuple[Any, Any]]) -> Any:
        found = dict(pairs)
        self._add(found.values())
        if len(found) < len(pairs):
            raise InputError("a map of the frame has a key twice")
        if ARRAY in found:
            return _array(found)
        if SCALAR in found:
            return _scalar(found)
        for key in found:
            if not isinstance(key, str):
                raise InputError(f"the keys of a map must be strings, got {key[:40]!r}")
        return found

    def _add(self, values: Iterable[Any]) -> None:
        self._left -= 1
        if any(isinstance(value, msgpack.Timestamp) for value in values):
            _refuse_extension(-1, b"")
        if self._left < 0:
            raise InputError(f"the frame has more than {self._most} maps and lists")


def _array(found: dict[bytes, Any]) -> np.ndarray:
    if set(found) != {ARRAY, DATA, DTYPE, SHAPE}:
        raise InputError(f"an array has the keys data, dtype and shape, got {_keys(found, ARRAY)}")
    data, dtype, shape = found[DATA], _dtype(found[DTYPE]), found[SHAPE]
    if not isinstance(data, bytes):
        raise InputError(f"an array's data must be bytes, got {type(data).__name__}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(_is_length(n) for n in shape):
        raise InputError(
            f"an array's shape must be a list of up to {MAX_AXES} positive lengths, got {str(shape)[:80]}"
        )
    if (needed := math.prod(shape) * dtype.itemsize) != len(data):
        raise InputError(
            f"an array of shape {tuple(shape)} and type {dtype} has {needed} bytes, got {len(data)}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _scalar(found: dict[bytes, Any]) -> bool | int | float:
    if set(found) != {SCALAR, DATA, DTYPE}:
        raise InputError(f"a scalar has the keys data and dtype, got {_keys(found, SCALAR)}")
    value = found[DATA]
    _dtype(found[DTYPE])
    if not isinstance(value, bool | int | float):
        raise InputError(f"a scalar's data must be a number, got {type(value).__name__}")
    return value


def _dtype(name: object) -> np.dtype[Any]:
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"an array's dtype must be one of {', '.join(DTYPES)}, got {str(name)[:40]!r}")
    return DTYPES[name]


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _keys(found: dict[bytes, Any], marker: bytes) -> str:
    return ", ".join(sorted(str(key)[:40] for key in found if key != marker)) or "none"


def _refuse_extension(code: int, data: bytes) -> Any:
    raise InputError(f"the frame holds MessagePack's extension type {code}, which no message has")


def _pack_numpy(value: object) -> dict[bytes, Any]:
    """`msgpack` asks for what it does not know."""
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"it holds a {type(value).__name__}")
    if value.dtype.newbyteorder("<").str not in DTYPES:
        raise TypeError(f"it holds an array of type {value.dtype}; arrays can be of {', '.join(DTYPES)}")
    little = value.astype(value.dtype.newbyteorder("<"), copy=False)
    if isinstance(little, np.generic):
        return {SCALAR: True, DATA: little.item(), DTYPE: little.dtype.str}
    return {ARRAY: True, DATA: little.tobytes(), DTYPE: little.dtype.str, SHAPE: little.shape}


def _reason(problem: BaseException) -> str:
    return str(problem) or {
        "StackError": "it is nested too deeply",
        "OutOfData": "it ends too early",
        "FormatError": "a byte begins no value",
    }.get(type(problem).__name__, type(problem).__name__)
