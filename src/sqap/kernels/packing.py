"""Two 4-bit levels to a byte.

A level q in [-8, 7] is stored as q + 8, the lower of two channels in the lower four bits. Four bytes
read as one little-endian int32 are then eight levels from the lowest bits up: the layout that
compressed-tensors calls ``pack-quantized``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqap.errors import InputError

OFFSET = 8


def packed_width(in_features: int) -> int:
    """Bytes that hold ``in_features`` 4-bit levels.

    Raises:
        InputError: the number is odd.
    """
    if in_features % 2:
        raise InputError(f"4-bit levels are stored in pairs, in_features {in_features} is odd")
    return in_features // 2


def pack_int4(q: Tensor) -> Tensor:
    """Levels ``(out, in)`` int8, each in [-8, 7], to bytes ``(out, in / 2)`` uint8.

    Raises:
        InputError: ``in`` is odd.
    """
    pairs = (q + OFFSET).to(torch.uint8).reshape(len(q), packed_width(q.shape[1]), 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """What `pack_int4` was given: ``(out, in)`` int8 from ``(out, in / 2)`` uint8."""
    # Each byte spread over the two bytes of an int16: the fastest way in plain PyTorch, on little-endian
    # machines, which are all that PyTorch ships for.
    pairs = packed.short()
    spread = (pairs | pairs << 4) & 0x0F0F
    return spread.view(torch.int8).sub_(OFFSET)
