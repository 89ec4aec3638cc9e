"""Levels of activations and weights at run time: to the nearest one, and back to floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

CHUNK = 1 << 18  # weights worked on at a time, as float32
TINY = torch.finfo(torch.float32).tiny


def largest_level(bits: int) -> int:
    """The largest integer of a symmetric grid: 7 for 4 bits, 127 for 8. Its negative is the smallest."""
    return (1 << bits - 1) - 1


def level_range(bits: int) -> tuple[int, int]:
    """Smallest and largest level of a symmetric grid: (-8, 7) for 4 bits, (-127, 127) for 8.

    The sixteenth level takes a tenth off the squared error of clipped 4-bit weights, and a quarter off that
    of 4-bit activations; a 256th gains nothing.
    """
    largest = largest_level(bits)
    return (-largest - 1 if bits == 4 else -largest), largest


def quantize_activation(
    x: Tensor,
    bits: int,
    granularity: Literal["token", "group", "tensor"],
    symmetric: bool = True,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round ``x`` ``(..., in)`` to int8 levels of the same shape, float32 scales and int32 zero points.

    ``x`` is about ``scale * (levels - zero_point)``. A symmetric grid has no zero point, and levels from -8
    to 7 or -127 to 127; as with clipped weights, a 4-bit scale is negative where the largest magnitude is a
    positive value, which then falls on level -8. An asymmetric grid spans what there is, from the smallest
    value or 0 to the largest or 0, with all 2**bits levels from -8 or -128 on. Where ``x`` is not finite, its
    scale is not.

    Scales and zero points have as many dimensions as ``x``: ``(..., 1)`` per token, ``(..., groups)`` per
    group of ``group_size`` channels, ``(1, ..., 1)`` per tensor.
    """
    group = group_size or x.shape[-1]
    wide = x.float().reshape(*x.shape[:-1], x.shape[-1] // group, group)
    dims = tuple(range(wide.dim())) if granularity == "tensor" else (-1,)
    # Two reductions instead of one of abs(): they need no memory as large as x.
    low, high = wide.amin(dims, keepdim=True), wide.amax(dims, keepdim=True)
    if symmetric:
        smallest, largest = level_range(bits)
        scale = (torch.maximum(high, -low) / -smallest).clamp_min_(TINY)
        if bits == 4:
            scale = torch.where(high > -low, -scale, scale)
        q = (wide / scale).round_().clamp_(smallest, largest)
        return q.flatten(-2).to(torch.int8), scale.squeeze(-1), None
    smallest, steps = -(1 << bits - 1), (1 << bits) - 1
    # Divided before they are subtracted, or the range of large finite values would be infinite.
    scale = (high.clamp_min(0) / steps - low.clamp_max(0) / steps).clamp_min_(TINY)
    zero_point = smallest - (low.clamp_max(0) / scale).round_()
    q = (wide / scale).round_().add_(zero_point).clamp_(smallest, smallest + steps)
    return q.flatten(-2).to(torch.int8), scale.squeeze(-1), zero_point.squeeze(-1).to(torch.int32)


def dequantize_activation(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The float32 ``(..., in)`` that `quantize_activation`'s levels, scales and zero points stand for."""
    groups = scale.shape[-1]
    grouped = q.float().view(*q.shape[:-1], groups, q.shape[-1] // groups)
    if zero_point is not None:
        grouped -= zero_point[..., None]
    return grouped.mul_(scale[..., None]).flatten(-2)


def dequantize_weight(q: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight ``(out, in)`` that levels ``(out, in)`` and scales `scale_shape` stand for."""
    return by_group(q, scale).mul_(scale[..., None]).flatten(1)


def row_chunks(weight: Tensor, size: int = CHUNK) -> Iterator[slice]:
    """Slices of rows of about ``size`` elements each: a float32 copy of a whole weight may not fit."""
    step = max(1, size // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, len(weight), step))


def rows_of(scale: Tensor, rows: slice) -> Tensor:
    """The scales of some rows: ``(rows, 1)``, ``(rows, groups)`` or, shared by all rows, ``(1, 1)``."""
    return scale if len(scale) == 1 else scale[rows]


def by_group(values: Tensor, scale: Tensor) -> Tensor:
    """``(rows, in)`` to a new float32 ``(rows, groups, in / groups)``."""
    return values.to(torch.float32, copy=True).reshape(len(values), scale.shape[1], -1)
