"""The grids: errors within half a step, scales of the promised shape, no NaN from zeros."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sqap.errors import InputError
from sqap.kernels.levels import (
    dequantize_activation,
    dequantize_weight,
    largest_level,
    level_range,
    quantize_activation,
    row_chunks,
)
from sqap.quantization.grid import clip_scale, max_scale, quantize_weight, round_to_grid, scale_shape

GRANULARITIES: list[tuple[Any, int | None]] = [("channel", None), ("group", 4), ("tensor", None)]
ACTIVATIONS: list[tuple[Any, int | None]] = [("token", None), ("group", 4), ("tensor", None)]
SCALES = {"token": (2, 5, 1), "group": (2, 5, 3), "tensor": (1, 1, 1)}  # of activations (2, 5, 12)
bits = st.sampled_from([4, 8])
seeds = st.integers(0, 2**31)
magnitudes = st.sampled_from([1e-30, 1e-3, 1.0, 1e30])


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounding_error(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted squared error under each scale, by definition and in 64 bits."""
    q = round_to_grid(weight, scale, bits).double()
    squares = (weight.double() - dequantize_weight(q, scale.double())).square()
    if importance is not None:
        squares *= importance.double()
    errors = squares.reshape(len(weight), scale.shape[1], -1).sum(2)
    return errors if len(scale) == len(weight) else errors.sum(0, keepdim=True)


@given(seeds, bits, st.sampled_from(GRANULARITIES), magnitudes)
@settings(max_examples=60, deadline=None)
def test_weights_are_rounded_to_the_nearest_level(
    seed: int, bits: int, granularity: tuple[Any, int | None], magnitude: float
) -> None:
    weight = magnitude * random(seed, 6, 12)
    q, scale = quantize_weight(weight, bits, *granularity)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == scale_shape(6, 12, *granularity)
    assert q.abs().max() == largest_level(bits)
    step = dequantize_weight(torch.ones_like(q), scale)
    assert ((weight - dequantize_weight(q, scale)).abs() <= 0.5001 * step).all()


@given(seeds, bits, st.sampled_from(ACTIVATIONS), magnitudes)
@settings(max_examples=60, deadline=None)
def test_activations_are_rounded_to_the_nearest_level(
    seed: int, bits: int, granularity: tuple[Any, int | None], magnitude: float
) -> None:
    x = magnitude * random(seed, 2, 5, 12)
    q, scale, zero_point = quantize_activation(x, bits, granularity[0], group_size=granularity[1])
    assert zero_point is None
    assert scale.shape == SCALES[granularity[0]]
    smallest, largest = level_range(bits)
    assert q.min() >= smallest
    assert q.max() <= largest
    step = dequantize_activation(torch.ones_like(q), scale, None)
    error = (x - dequantize_activation(q, scale, None)).abs()
    # Level 8, which is not there, is rounded to 7.
    assert (error <= torch.where((bits == 4) & (q == largest), 1.0001, 0.5001) * step.abs()).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_activation_falls_on_the_sixteenth_level(sign: int) -> None:
    x = sign * torch.tensor([[8.0, 6.4, -7.0, 0.0]])
    q, scale, _ = quantize_activation(x, 4, "token")
    assert q.tolist() == [[-8, -6, 7, 0]]
    assert scale.tolist() == [[-sign]]


def test_an_outlier_costs_its_own_group_only() -> None:
    x = torch.tensor([[1000.0, 1.0, 1.0, 0.5]])
    q, scale, zero_point = quantize_activation(x, 4, "group", group_size=2)
    torch.testing.assert_close(
        dequantize_activation(q, scale, zero_point), torch.tensor([[1000.0, 0.0, 1.0, 0.5]])
    )


@given(seeds, bits, st.sampled_from(ACTIVATIONS), magnitudes, st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_zero_points_keep_what_leans_to_one_side_within_half_a_step(
    seed: int, bits: int, granularity: tuple[Any, int | None], magnitude: float, lean: float
) -> None:
    x = magnitude * (random(seed, 2, 5, 12) + lean)
    x[0, 0, 0] = 0
    q, scale, zero_point = quantize_activation(x, bits, granularity[0], False, granularity[1])
    assert zero_point is not None
    assert scale.shape == zero_point.shape == SCALES[granularity[0]]
    assert q.dtype == torch.int8
    for levels in (q, zero_point):
        assert levels.min() >= -(1 << bits - 1)
        assert levels.max() <= largest_level(bits)
    assert q[0, 0, 0] == zero_point.flatten()[0]  # zero is on the grid
    grouped = x.unflatten(-1, (scale.shape[-1], -1))
    dims = (0, 1, 2, 3) if granularity[0] == "tensor" else (3,)
    span = grouped.amax(dims).clamp_min(0) - grouped.amin(dims).clamp_max(0)
    torch.testing.assert_close(scale, (span / ((1 << bits) - 1)).reshape(scale.shape))
    step = dequantize_activation(torch.ones_like(q), scale, None)
    assert ((x - dequantize_activation(q, scale, zero_point)).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_scale_of_activations_that_are_not_finite_says_so(symmetric: bool, bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    _, scale, _ = quantize_activation(x, 8, "token", symmetric)
    assert scale.isfinite().flatten().tolist() == [True, False, True]


def test_the_largest_finite_activations_have_a_finite_scale() -> None:
    largest = torch.finfo(torch.float32).max
    q, scale, zero_point = quantize_activation(torch.tensor([[largest, -largest]]), 8, "token", False)
    assert scale.isfinite().all()
    assert zero_point is not None
    assert (q.int() - zero_point).tolist() in ([[127, -128]], [[128, -127]], [[127, -127]])


@given(seeds, bits, st.sampled_from(GRANULARITIES), magnitudes, st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_clip_search_never_loses_to_the_largest_weight(
    seed: int, bits: int, granularity: tuple[Any, int | None], magnitude: float, weighted: bool
) -> None:
    weight = magnitude * random(seed, 6, 12) ** 3
    weight[0] = 0
    importance = random(seed + 1, 12).square() if weighted else None
    clipped, covering = (
        clip_scale(weight, bits, *granularity, importance),
        max_scale(weight, bits, *granularity),
    )
    assert clipped.dtype == torch.float32
    assert clipped.shape == covering.shape
    assert (clipped.abs() <= covering).all()
    found, limit = (rounding_error(weight, scale, bits, importance) for scale in (clipped, covering))
    assert (found <= 1.00001 * limit).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_clip_search_comes_close_to_trying_everything(
    bits: int, granularity: tuple[Any, int | None]
) -> None:
    weight, importance = random(0, 20, 240) ** 3, random(1, 240).square()
    size = None if granularity[1] is None else 60
    covering = max_scale(weight, bits, granularity[0], size)
    tried = [
        rounding_error(weight, sign * factor * covering, bits, importance)
        for factor in torch.linspace(0.2, 1, 161).tolist()
        for sign in (1, -1)
    ]
    best = torch.stack(tried).amin(0)
    found = rounding_error(
        weight, clip_scale(weight, bits, granularity[0], size, importance), bits, importance
    )
    assert found.sum() < (1.05 if bits == 4 else 1.2) * best.sum()


def test_clipping_uses_the_whole_grid_and_its_longer_side() -> None:
    weight = random(0, 50, 192)
    scale = clip_scale(weight, 4, "channel")
    q = round_to_grid(weight, scale, 4)
    assert level_range(4) == (-8, 7)
    assert (q.amin(1) == -8).all()
    assert q.max() == 7
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    assert torch.equal(scale > 0, largest < 0)
    torch.testing.assert_close(clip_scale(-weight, 4, "channel"), -scale)
    assert (clip_scale(weight, 8, "channel") > 0).all()
    assert round_to_grid(-weight, 0.5 * max_scale(weight, 8, "channel"), 8).min() == -127


def test_what_is_important_is_not_clipped() -> None:
    weight, importance = random(0, 8, 512), torch.ones(512)
    weight[:, 3], importance[3] = 20, 1e5
    for given_importance, clipped in ((None, True), (importance, False)):
        scale = clip_scale(weight, 4, "channel", None, given_importance)
        outlier = dequantize_weight(round_to_grid(weight, scale, 4), scale)[:, 3]
        assert ((outlier - 20).abs() > 2).all() == clipped


def test_a_weight_larger_than_a_chunk_is_treated_row_by_row() -> None:
    weight = random(0, 600, 600)  # 600 x 600 is more than one chunk
    scale = clip_scale(weight, 4, "channel")
    torch.testing.assert_close(scale[500:], clip_scale(weight[500:], 4, "channel"))
    q = round_to_grid(weight, scale, 4)
    assert torch.equal(q, (weight / scale).round().clamp(-8, 7).to(torch.int8))
    tensor = clip_scale(weight, 4, "tensor")
    found, limit = (rounding_error(weight, s, 4) for s in (tensor, max_scale(weight, 4, "tensor")))
    assert found.item() < 0.7 * limit.item()


def test_importance_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match=r"importance .* not finite"):
        clip_scale(torch.ones(2, 4), 4, "channel", None, torch.tensor([1, 1, float("nan"), 1]))


def test_every_channel_and_every_token_uses_the_whole_grid() -> None:
    x = random(0, 5, 12) * torch.logspace(-3, 3, 5)[:, None]
    assert (quantize_weight(x, 4, "channel")[0].abs().amax(1) == 7).all()
    assert (quantize_activation(x, 4, "token")[0].amin(1) == -8).all()
    assert quantize_weight(x, 4, "tensor")[0][0].abs().max() == 0


def test_group_scales_belong_to_their_own_columns() -> None:
    weight = torch.tensor([[7.0, 1.0, 70.0, 10.0], [14.0, 2.0, 0.7, 0.1]])
    q, scale = quantize_weight(weight, 4, "group", 2)
    torch.testing.assert_close(scale, torch.tensor([[1.0, 10.0], [2.0, 0.1]]))
    assert q.tolist() == [[7, 1, 7, 1], [7, 1, 7, 1]]


@pytest.mark.parametrize("value", [0.0, 1e-45])
def test_zeros_and_denormals_stay_finite(value: float) -> None:
    x = torch.full((3, 8), value)
    for scale in (max_scale(x, 4, "channel"), clip_scale(x, 4, "channel")):
        assert scale.isfinite().all()
        assert (round_to_grid(x, scale, 4) == 0).all()
    for symmetric in (True, False):
        q, scale, zero_point = quantize_activation(x, 4, "token", symmetric)
        assert scale.isfinite().all()
        assert (scale != 0).all()
        assert (q == (0 if zero_point is None else zero_point)).all()


def test_scales_are_per_channel_where_no_group_is_asked_for() -> None:
    assert scale_shape(6, 12, "channel", 4) == scale_shape(6, 12, "group", None) == (6, 1)


def test_the_unit_of_the_importance_does_not_matter() -> None:
    weight, importance = random(0, 8, 64) ** 3, random(1, 64).square()
    expected = clip_scale(weight, 4, "channel", None, importance)
    for unit in (2.0**-100, 2.0**100):
        assert torch.equal(clip_scale(weight, 4, "channel", None, unit * importance), expected)


def test_where_both_signs_are_as_large_the_scale_is_positive() -> None:
    x = torch.tensor([[3.0, -3.0, 1.0, 0.0]])
    assert quantize_activation(x, 4, "token")[1].item() > 0
    assert clip_scale(x, 4, "channel").item() > 0


def test_the_clip_search_finds_each_of_its_coarse_factors() -> None:
    """A row whose error is zero for one factor of `max_scale` alone."""
    for step in range(1, 5):
        factor = 0.8**step
        # One weight falls beyond the grid, and costs nothing; the others are levels of the factor's grid.
        weight = torch.tensor([[-7 / factor, 1.0, -2.0, 3.0, -4.0, 5.0, 7.0, 6.0]])
        importance = torch.tensor([0.0, *[1.0] * 7])
        found = clip_scale(weight, 4, "channel", None, importance)
        torch.testing.assert_close(found, factor * max_scale(weight, 4, "channel"))


def test_where_nothing_is_gained_nothing_is_clipped() -> None:
    zeros = torch.zeros(2, 8)
    assert torch.equal(clip_scale(zeros, 4, "channel"), max_scale(zeros, 4, "channel"))


def test_the_types_of_levels_and_zero_points() -> None:
    q, scale, zero_point = quantize_activation(random(0, 2, 8).bfloat16(), 8, "token", False)
    assert zero_point is not None
    assert (q.dtype, scale.dtype, zero_point.dtype) == (torch.int8, torch.float32, torch.int32)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((5, 3), 6, [[0, 1], [2, 3], [4]]),
        ((3, 3), 2, [[0], [1], [2]]),
        ((3, 3), 100, [[0, 1, 2]]),
        ((3, 1), 2, [[0, 1], [2]]),
        ((3, 0), 2, [[0, 1], [2]]),
    ],
)
def test_rows_come_in_chunks_of_about_a_size(
    shape: tuple[int, int], size: int, expected: list[list[int]]
) -> None:
    rows = torch.arange(shape[0])
    assert [rows[chunk].tolist() for chunk in row_chunks(torch.empty(shape), size)] == expected


def test_group_size_must_divide_the_inputs() -> None:
    with pytest.raises(InputError, match="group_size 5 does not divide in_features 12"):
        quantize_weight(torch.ones(2, 12), 4, "group", 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(2, 4)
    weight[1, 2] = bad
    with pytest.raises(InputError, match="not finite"):
        quantize_weight(weight, 8, "channel")
