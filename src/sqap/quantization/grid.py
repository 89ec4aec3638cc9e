"""The grids: uniform levels, rounded to nearest, with scales from the largest magnitude or a clip search."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.recipe import ActivationGranularity, WeightGranularity

CHUNK = 1 << 18  # weights worked on at a time, as float32
COARSE_STEPS = 8
COARSE_RATIO = 0.8
FINE_EXPONENTS = (1 / 2, 1 / 4, 1 / 8)
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


def max_scale(
    weight: Tensor, bits: int, granularity: WeightGranularity, group_size: int | None = None
) -> Tensor:
    """Scales (`scale_shape`, float32) that put the largest magnitude on the largest level.

    Raises:
        InputError: the group size does not divide ``in``, or a weight is not finite.
    """
    low, high = _extremes(weight, granularity, group_size)
    return _scale(torch.maximum(high, -low), bits)


def clip_scale(
    weight: Tensor,
    bits: int,
    granularity: WeightGranularity,
    group_size: int | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """Scales (`scale_shape`, float32) that clip large weights where this lowers the squared error of all.

    14 shrink factors of `max_scale` are tried, from coarse to fine, for every scale by itself. The error is
    never above that of `max_scale`. A 4-bit scale is negative where the largest magnitude is a positive
    weight, so that it falls on the longer side of the grid, level -8.

    Args:
        weight: ``(out, in)``.
        bits: 4 or 8.
        granularity: what shares a scale.
        group_size: input channels per scale, with granularity "group".
        importance: weight of each input channel's squared error, ``(in,)``: the mean square of its inputs.

    Raises:
        InputError: the group size does not divide ``in``, or a weight or an importance is not finite.
    """
    if importance is not None:
        if not importance.isfinite().all():
            raise InputError("the importance of the input channels holds values that are not finite")
        importance = importance.float() / importance.float().mean().clamp_min(TINY)
    low, high = _extremes(weight, granularity, group_size)
    largest = _scale(torch.maximum(high, -low), bits)
    if bits == 4:
        largest = torch.where(high > -low, -largest, largest)

    def error(factor: Tensor) -> Tensor:
        return _rounding_error(weight, largest * factor, bits, importance) * factor**2

    return largest * _search(error, torch.ones_like(largest))


def round_to_grid(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest level of every weight ``(out, in)``, int8, given scales of one of the `scale_shape`\\ s."""
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in row_chunks(weight):
        grouped = _grouped(weight[rows], scale)
        levels[rows] = (
            (grouped / rows_of(scale, rows)[..., None]).round_().clamp_(*level_range(bits)).flatten(1)
        )
    return levels


def quantize_weight(
    weight: Tensor, bits: int, granularity: WeightGranularity, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Round ``weight`` ``(out, in)`` to int8 levels of the same shape, by float32 scales of `max_scale`.

    Raises:
        InputError: the group size does not divide ``in``, or a weight is not finite.
    """
    scale = max_scale(weight, bits, granularity, group_size)
    return round_to_grid(weight, scale, bits), scale


def dequantize_weight(q: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight ``(out, in)`` that levels ``(out, in)`` and scales `scale_shape` stand for."""
    return _grouped(q, scale).mul_(scale[..., None]).flatten(1)


def quantize_activation(
    x: Tensor,
    bits: int,
    granularity: ActivationGranularity,
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


def row_chunks(weight: Tensor, size: int = CHUNK) -> Iterator[slice]:
    """Slices of rows of about ``size`` elements each: a float32 copy of a whole weight may not fit."""
    step = max(1, size // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, len(weight), step))


def rows_of(scale: Tensor, rows: slice) -> Tensor:
    """The scales of some rows: ``(rows, 1)``, ``(rows, groups)`` or, shared by all rows, ``(1, 1)``."""
    return scale if len(scale) == 1 else scale[rows]


def _scale(largest: Tensor, bits: int) -> Tensor:
    # Never below the smallest normal number, so that zeros are divided by something. Nothing is larger than
    # the value the scale is taken from, so that no level needs a clamp.
    return (largest / largest_level(bits)).clamp_min_(TINY)


def _grouped(values: Tensor, scale: Tensor) -> Tensor:
    """``(rows, in)`` to a new float32 ``(rows, groups, in / groups)``."""
    return values.to(torch.float32, copy=True).reshape(len(values), scale.shape[1], -1)


def _extremes(
    weight: Tensor, granularity: WeightGranularity, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight under each scale, float32, in `scale_shape`."""
    outputs, inputs = weight.shape
    groups = scale_shape(outputs, inputs, granularity, group_size)[1]
    low, high = weight.reshape(outputs, groups, -1).aminmax(dim=2)
    if granularity == "tensor":
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise InputError("the weight holds values that are not finite, which no grid can carry")
    return low.float(), high.float()


def _rounding_error(weight: Tensor, scale: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """Sum of the squared errors under each scale, in units of its square, in the shape of ``scale``."""
    errors = scale.new_empty(len(weight), scale.shape[1])
    for rows in row_chunks(weight):
        error = _grouped(weight[rows], scale).div_(rows_of(scale, rows)[..., None])
        error.sub_(error.round().clamp_(*level_range(bits))).square_()
        if importance is not None:
            error *= importance.view(scale.shape[1], -1)
        errors[rows] = error.sum(2)
    return errors if len(scale) == len(weight) else errors.sum(0, keepdim=True)


def _search(error: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The factor in (0, 1] with the lowest error found, for each element of ``start`` (all ones)."""
    best = start, error(start)
    for step in range(1, COARSE_STEPS):
        best = _better(best, start * COARSE_RATIO**step, error)
    for exponent in FINE_EXPONENTS:
        centre = best[0]
        for ratio in (COARSE_RATIO**exponent, COARSE_RATIO**-exponent):
            best = _better(best, (centre * ratio).clamp_max(1), error)
    return best[0]


def _better(
    best: tuple[Tensor, Tensor], factor: Tensor, error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Factors and their errors: the best so far, or ``factor`` where its error is lower."""
    found = error(factor)
    return torch.where(found < best[1], factor, best[0]), torch.minimum(found, best[1])
