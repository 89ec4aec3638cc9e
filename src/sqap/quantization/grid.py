"""The grid: symmetric, uniform, rounded to nearest, with the scale taken from the largest magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.recipe import ActivationGranularity, WeightGranularity


def largest_level(bits: int) -> int:
    """The grid's largest integer: 7 for 4 bits, 127 for 8. Its negative is the smallest."""
    return (1 << bits - 1) - 1


def scale_shape(
    out_features: int, in_features: int, granularity: WeightGranularity, group_size: int | None
) -> tuple[int, int]:
    """Shape of a weight's scales: ``(out, 1)``, ``(out, in / group_size)`` or ``(1, 1)``.

    Raises:
        InputError: the group size does not divide ``in_features``.
    """
    if granularity == "tensor":
        return 1, 1
    if granularity == "channel" or group_size is None:
        return out_features, 1
    if in_features % group_size:
        raise InputError(f"group_size {group_size} does not divide in_features {in_features}")
    return out_features, in_features // group_size


def quantize_weight(
    weight: Tensor, bits: int, granularity: WeightGranularity, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Round ``weight`` ``(out, in)`` to int8 levels of the same shape and float32 scales (`scale_shape`).

    Raises:
        InputError: the group size does not divide ``in``, or a weight is not finite.
    """
    out_features, in_features = weight.shape
    groups = scale_shape(out_features, in_features, granularity, group_size)[1]
    if not weight.isfinite().all():
        raise InputError("the weight holds values that are not finite, which no grid can carry")
    grouped = weight.float().reshape(out_features, groups, -1)
    largest = grouped.abs().amax((0, 2) if granularity == "tensor" else 2, keepdim=True)
    scale = _scale(largest, bits)
    return (grouped / scale).round_().to(torch.int8).flatten(1), scale.squeeze(2)


def dequantize_weight(q: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight ``(out, in)`` that levels ``(out, in)`` and scales `scale_shape` stand for."""
    grouped = q.reshape(len(q), scale.shape[1], -1)
    return (grouped * scale[..., None]).flatten(1)


def quantize_activation(x: Tensor, bits: int, granularity: ActivationGranularity) -> tuple[Tensor, Tensor]:
    """Round ``x`` ``(..., in)`` to int8 levels of the same shape and float32 scales.

    The scales have as many dimensions as ``x``: ``(..., 1)`` per token, ``(1, ..., 1)`` per tensor.
    """
    wide = x.float()
    dims = tuple(range(x.dim())) if granularity == "tensor" else (-1,)
    # Two reductions instead of one of abs(): they need no memory as large as x.
    largest = torch.maximum(wide.amax(dims, keepdim=True), -wide.amin(dims, keepdim=True))
    scale = _scale(largest, bits)
    return (wide / scale).round_().to(torch.int8), scale


def _scale(largest: Tensor, bits: int) -> Tensor:
    # Never below the smallest normal number, so that zeros are divided by something. No clamp is needed
    # after rounding: nothing is larger than the value the scale was taken from.
    return (largest / largest_level(bits)).clamp_min_(torch.finfo(torch.float32).tiny)
