"""The grids: uniform levels, rounded to nearest, with scales from the largest magnitude or a clip search."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.kernels.levels import TINY, by_group, largest_level, level_range, row_chunks, rows_of
from sqap.recipe import WeightGranularity

COARSE_STEPS = 8
COARSE_RATIO = 0.8
FINE_EXPONENTS = (1 / 2, 1 / 4, 1 / 8)


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
        grouped = by_group(weight[rows], scale)
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


def _scale(largest: Tensor, bits: int) -> Tensor:
    # Never below the smallest normal number, so that zeros are divided by something. Nothing is larger than
    # the value the scale is taken from, so that no level needs a clamp.
    return (largest / largest_level(bits)).clamp_min_(TINY)


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
        error = by_group(weight[rows], scale).div_(rows_of(scale, rows)[..., None])
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
