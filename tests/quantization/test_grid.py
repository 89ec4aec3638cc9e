"""The grid: errors within half a step, scales of the promised shape, and no NaN from zeros."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sqap.errors import InputError
from sqap.quantization.grid import (
    dequantize_weight,
    largest_level,
    quantize_activation,
    quantize_weight,
    scale_shape,
)

GRANULARITIES: list[tuple[Any, int | None]] = [("channel", None), ("group", 4), ("tensor", None)]
bits = st.sampled_from([4, 8])
seeds = st.integers(0, 2**31)
magnitudes = st.sampled_from([1e-30, 1e-3, 1.0, 1e30])


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


@given(seeds, bits, st.sampled_from(["token", "tensor"]), magnitudes)
@settings(max_examples=60, deadline=None)
def test_activations_are_rounded_to_the_nearest_level(
    seed: int, bits: int, granularity: Any, magnitude: float
) -> None:
    x = magnitude * random(seed, 2, 5, 12)
    q, scale = quantize_activation(x, bits, granularity)
    assert scale.shape == ((2, 5, 1) if granularity == "token" else (1, 1, 1))
    assert q.abs().max() <= largest_level(bits)
    assert ((x - q * scale).abs() <= 0.5001 * scale).all()


def test_every_channel_and_every_token_uses_the_whole_grid() -> None:
    x = random(0, 5, 12) * torch.logspace(-3, 3, 5)[:, None]
    assert (quantize_weight(x, 4, "channel")[0].abs().amax(1) == 7).all()
    assert (quantize_activation(x, 4, "token")[0].abs().amax(1) == 7).all()
    assert quantize_weight(x, 4, "tensor")[0][0].abs().max() == 0


def test_group_scales_belong_to_their_own_columns() -> None:
    weight = torch.tensor([[7.0, 1.0, 70.0, 10.0], [14.0, 2.0, 0.7, 0.1]])
    q, scale = quantize_weight(weight, 4, "group", 2)
    torch.testing.assert_close(scale, torch.tensor([[1.0, 10.0], [2.0, 0.1]]))
    assert q.tolist() == [[7, 1, 7, 1], [7, 1, 7, 1]]


@pytest.mark.parametrize("value", [0.0, 1e-45])
def test_zeros_and_denormals_stay_finite(value: float) -> None:
    x = torch.full((3, 8), value)
    for q, scale in (quantize_weight(x, 4, "channel"), quantize_activation(x, 4, "token")):
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert (q * scale == 0).all()


def test_group_size_must_divide_the_inputs() -> None:
    with pytest.raises(InputError, match="group_size 5 does not divide in_features 12"):
        quantize_weight(torch.ones(2, 12), 4, "group", 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(2, 4)
    weight[1, 2] = bad
    with pytest.raises(InputError, match="not finite"):
        quantize_weight(weight, 8, "channel")
