"""GPTQ: never worse than rounding to nearest, and the same levels as the textbook's algorithm."""

import logging
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sqap.errors import InputError
from sqap.kernels.levels import dequantize_weight, level_range
from sqap.quantization import gptq as module
from sqap.quantization.gptq import Factor, Hessian, gptq
from sqap.quantization.grid import clip_scale, max_scale, round_to_grid

GRANULARITIES: list[tuple[Any, int | None]] = [("channel", None), ("group", 10), ("tensor", None)]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int, tokens: int, size: int) -> Tensor:
    """Inputs with a few strong directions and channels of different strength."""
    mixed = random(seed, tokens, 5) @ random(seed + 1, 5, size) + 0.3 * random(seed + 2, tokens, size)
    return mixed * random(seed + 3, size).exp()


def factor_of(x: Tensor, order: Tensor | None = None, damping: float = 0.01) -> Factor:
    hessian = Hessian(x.square().mean(0).argsort() if order is None else order)
    hessian.add(x)
    return hessian.factor(damping)


def output_errors(x: Tensor, weight: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """||X (w - q)||^2 of each row, by definition and in 64 bits."""
    return ((weight.double() - dequantize_weight(q, scale).double()) @ x.double().T).square().sum(1)


def textbook(weight: Tensor, scale: Tensor, bits: int, x: Tensor, order: Tensor, damping: float) -> Tensor:
    """GPTQ as published: the first column first, by the Cholesky factor of the inverse Hessian, in 64 bits.

    Ours goes from the last column to the first, so that the order is reversed.
    """
    order = order.flip(0)
    h = x.double().T @ x.double()
    h = (h + damping * h.diagonal().mean() * torch.eye(len(h)))[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    steps = dequantize_weight(torch.ones_like(weight), scale).double()[:, order]
    left, q = weight.double()[:, order], torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(len(h)):
        q[:, j] = (left[:, j] / steps[:, j]).round().clamp(*level_range(bits))
        error = (left[:, j] - q[:, j] * steps[:, j]) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    return q[:, order.argsort()].to(torch.int8)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("bits", "size", "tokens", "damping"),
    [(4, 10, 30, 0.01), (4, 30, 5, 3), (4, 150, 90, 0.01), (8, 290, 400, 0.01)],
)
def test_levels_are_the_textbooks(
    granularity: tuple[Any, int | None], bits: int, size: int, tokens: int, damping: float
) -> None:
    weight, x = random(0, 40, size), correlated(1, tokens, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    scale = clip_scale(weight, bits, *granularity)
    published = textbook(weight, scale, bits, x, order, damping)
    nearest = round_to_grid(weight, scale, bits)
    better = output_errors(x, weight, published, scale) <= output_errors(x, weight, nearest, scale)
    assert better.sum() > 20
    found = gptq(weight, scale, bits, factor_of(x, order, damping))
    assert torch.equal(found, torch.where(better[:, None], published, nearest))


@pytest.mark.parametrize("size", [1, 17, 129])
def test_a_strip_of_one_column_is_rounded_too(size: int) -> None:
    test_levels_are_the_textbooks(("channel", None), 4, size, 3 * size, 0.01)


@given(
    st.integers(0, 2**31),
    st.sampled_from([4, 8]),
    st.sampled_from(GRANULARITIES),
    st.sampled_from([(3, 10), (40, 20), (20, 150), (300, 140)]),
    st.booleans(),
    st.sampled_from([1e-4, 0.01, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_no_row_is_worse_than_rounded_to_nearest(
    seed: int, bits: int, granularity: Any, shape: tuple[int, int], white: bool, damping: float
) -> None:
    x = random(seed, *shape) if white else correlated(seed, *shape)
    weight = random(seed + 9, 30, shape[1])
    scale = clip_scale(weight, bits, *granularity)
    q = gptq(weight, scale, bits, factor_of(x, damping=damping))
    low, high = level_range(bits)
    assert q.dtype == torch.int8
    assert low <= q.min()
    assert q.max() <= high
    nearest = output_errors(x, weight, round_to_grid(weight, scale, bits), scale)
    assert (output_errors(x, weight, q, scale) <= 1.0001 * nearest).all()


def test_correlated_inputs_gain_much() -> None:
    weight, x = random(0, 50, 200), correlated(1, 500, 200)
    scale = max_scale(weight, 4, "channel")
    found = output_errors(x, weight, gptq(weight, scale, 4, factor_of(x)), scale)
    nearest = output_errors(x, weight, round_to_grid(weight, scale, 4), scale)
    assert found.sum() < 0.4 * nearest.sum()


def test_the_most_important_column_is_best_rounded_first() -> None:
    weight, x = random(0, 50, 200), correlated(1, 500, 200)
    scale = max_scale(weight, 4, "channel")
    ascending = x.square().mean(0).argsort()
    best, worst = (
        output_errors(x, weight, gptq(weight, scale, 4, factor_of(x, order)), scale).sum()
        for order in (ascending, ascending.flip(0))
    )
    assert best < 0.9 * worst


def test_channels_without_input_are_rounded_to_nearest() -> None:
    weight, x = random(0, 20, 140), correlated(1, 300, 140)
    scale = max_scale(weight, 4, "channel")
    nearest = round_to_grid(weight, scale, 4)
    dead = torch.tensor([0, 7, 130])
    x[:, dead] = 0
    found = gptq(weight, scale, 4, factor_of(x))
    assert torch.equal(found[:, dead], nearest[:, dead])
    assert not torch.equal(found, nearest)
    assert torch.equal(gptq(weight, scale, 4, factor_of(torch.zeros_like(x))), nearest)


def test_rows_and_inputs_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random(0, 20, 140).bfloat16(), correlated(1, 60, 140)
    order = x.square().mean(0).argsort()
    scale = max_scale(weight, 4, "channel")
    whole = gptq(weight.float(), scale, 4, factor_of(x, order))
    monkeypatch.setattr(module, "CHUNK", 3 * 140)
    monkeypatch.setattr(module, "TOKENS", 7)
    hessian = Hessian(order)
    for part in (x[:20].view(2, 10, 140), x[20:]):
        hessian.add(part)
    assert torch.equal(gptq(weight, scale, 4, hessian.factor()), whole)


def test_half_of_the_square_is_kept() -> None:
    factor = factor_of(random(0, 10, 1024))
    assert sum(panel.numel() for panel in factor.panels) < 0.6 * 1024**2


def bidiagonal(size: int) -> Tensor:
    """Inputs whose Hessian factorizes without rounding, and whose last two columns are the same."""
    x = torch.eye(size - 1) + torch.eye(size - 1).roll(1, 1).triu()
    return torch.cat([x, x[:, -1:]], 1)


@pytest.mark.parametrize("size", [2, 40, 129, 300])
def test_more_damping_rescues_a_hessian_that_is_not_positive_definite(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    x, order = bidiagonal(size), torch.arange(size)
    hessian = Hessian(order, "decoder.layers.3.mlp.down_proj")
    hessian.add(x)
    with caplog.at_level(logging.WARNING, "sqap"):
        factor = hessian.factor(damping=0)
    (message,) = [record.message for record in caplog.records]
    assert "decoder.layers.3.mlp.down_proj" in message
    assert "damping 0; going on with 0.0001" in message
    expected = factor_of(x, order, damping=1e-4)
    assert factor.damping == pytest.approx(expected.damping)
    torch.testing.assert_close(factor.diagonal, expected.diagonal, rtol=1e-3, atol=1e-6)
    for found, wanted in zip(factor.panels, expected.panels, strict=True):
        torch.testing.assert_close(found.tril(), wanted.tril(), rtol=1e-3, atol=1e-3)


def test_damping_grows_tenfold_until_the_hessian_can_be_factorized(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SMALLEST_DAMPING", 1e-12)
    x, order = bidiagonal(40), torch.arange(40)
    hessian = Hessian(order)
    hessian.add(x)
    with caplog.at_level(logging.WARNING, "sqap"):
        factor = hessian.factor(damping=1e-9)
    last = 1e-9 * 10 ** len(caplog.records)
    assert len(caplog.records) > 1
    assert f"going on with {last:g}" in caplog.messages[-1]
    expected = factor_of(x, order, last)
    assert factor.damping == pytest.approx(expected.damping)
    torch.testing.assert_close(factor.diagonal[:-1], expected.diagonal[:-1], rtol=1e-4, atol=0)


def test_what_was_added_to_the_diagonal_counts_when_damping_grows() -> None:
    hessian = Hessian(torch.arange(4))
    hessian.add(2 * torch.eye(4))
    hessian._panels[0][0, 0] = -2  # no sum of squares, and no better with 0.3 of the mean, which is 2.5
    factor = hessian.factor(damping=0.3)
    assert factor.damping == pytest.approx(3 * 2.5)
    torch.testing.assert_close(factor.diagonal, torch.tensor([5.5, 11.5, 11.5, 11.5]))


def test_inputs_whose_squares_are_large_but_finite_are_factorized() -> None:
    """Their sum over all channels is infinite in 32 bits; their mean is not."""
    factor = factor_of(1e19 * torch.eye(64), damping=0.5)
    assert factor.damping == pytest.approx(0.5e38)
    torch.testing.assert_close(factor.diagonal, torch.full((64,), 1.5e38))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    x = torch.ones(5, 8)
    x[3, 2] = bad
    with pytest.raises(InputError, match=r"projector\.layers\.0 inputs that are not finite"):
        Hessian(torch.arange(8), "projector.layers.0").add(x)
    with pytest.raises(InputError, match="gives the linear inputs that are not finite"):
        Hessian(torch.arange(8)).add(x)


def test_inputs_too_large_to_square_are_refused_by_name() -> None:
    hessian = Hessian(torch.arange(8), "projector.layers.0")
    hessian.add(torch.full((5, 8), 1e20))
    with pytest.raises(InputError, match=r"projector\.layers\.0 inputs too large to square"):
        hessian.factor()


def test_the_importance_of_a_channel_is_its_sum_of_squares() -> None:
    x = correlated(0, 50, 140)
    torch.testing.assert_close(factor_of(x).importance, x.square().sum(0))
