"""Every path that runs here: exact integers, the reference's grids and products, no read beyond an array."""

from __future__ import annotations

import math
from typing import Any, get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from sqap.errors import InputError
from sqap.kernels import Function, Grids, Packed, cpu
from sqap.kernels.hadamard import block_hadamard
from sqap.kernels.levels import level_range, quantize_activation
from sqap.kernels.packing import pack_int4
from sqap.kernels.reference import ACTIVATIONS
from sqap.quantization.linear import QuantizedLinear
from sqap.quantization.rotation import HadamardLinear
from sqap.recipe import Scheme

PATHS = [path for path in cpu.paths() if path != cpu.REFERENCE]
every_path = pytest.mark.parametrize("path", PATHS)
sizes = st.integers(1, 200)
seeds = st.integers(0, 2**31)


def test_the_extension_is_built() -> None:
    assert "portable" in PATHS


def random_levels(low: int, high: int, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


def check_products(path: str, bits: int, tokens: int, inputs: int, outputs: int, seed: int) -> None:
    inputs += inputs % 2 if bits == 4 else 0
    low, high = level_range(bits)
    weight = random_levels(low, high, seed, outputs, inputs)
    q = random_levels(-128, 127, seed + 1, tokens, inputs)
    weight[0] = low  # sums as large as can be
    q[:1] = -128
    found = cpu.matmul(q, pack_int4(weight) if bits == 4 else weight, bits, path)
    assert torch.equal(found.long(), q.long() @ weight.long().T)


@every_path
@given(st.sampled_from([4, 8]), st.integers(0, 40), sizes, sizes, seeds)
@example(4, 600, 36, 5, 0)
@example(8, 3, 4099, 17, 0)
@example(4, 29, 11008, 33, 0)
@settings(max_examples=60, deadline=None)
def test_products_are_exact(path: str, bits: int, tokens: int, inputs: int, outputs: int, seed: int) -> None:
    check_products(path, bits, tokens, inputs, outputs, seed)


@every_path
@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_exact_however_many_threads(path: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_products(path, 4, 70, 300, 150, 0)
    finally:
        torch.set_num_threads(before)


def bound(
    path: str, channels: int, bits: int, symmetric: bool, size: int, block: int = 1, outputs: int = 1
) -> cpu.CpuLinear:
    """A linear with weights of 8 bits, all scales one."""
    weight = random_levels(-127, 127, 0, outputs, channels)
    return cpu.CpuLinear(Packed(weight, torch.ones(1, 1), None, Grids(8, bits, symmetric, size, block)), path)


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int, bool]:
    """Channels, channels per scale (0 for one scale), bits, whether symmetric."""
    channels = draw(st.sampled_from([6, 32, 96, 256]))
    size = draw(st.sampled_from([0, 2, channels]))
    return channels, size, draw(st.sampled_from([4, 8])), draw(st.booleans())


@every_path
@given(grids(), st.integers(1, 20), st.sampled_from([torch.float32, torch.bfloat16]), seeds)
@settings(max_examples=60, deadline=None)
def test_activations_get_the_levels_of_the_reference(
    path: str, grid: tuple[int, int, int, bool], tokens: int, dtype: torch.dtype, seed: int
) -> None:
    channels, size, bits, symmetric = grid
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator) * 10 ** torch.randn(tokens, 1, generator=generator)
    x[0] = 0
    x = x.to(dtype)
    granularity: Any = {0: "tensor", channels: "token"}.get(size, "group")
    expected = quantize_activation(x, bits, granularity, symmetric, size if granularity == "group" else None)
    found = bound(path, channels, bits, symmetric, size).quantize(x)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].expand_as(found[1]))
    if found[2] is not None and expected[2] is not None:
        assert torch.equal(found[2], expected[2].expand_as(found[2]))
    assert (found[2] is None) == (expected[2] is None) == symmetric


@every_path
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_that_are_not_finite_give_outputs_that_are_not(
    path: str, bad: float, symmetric: bool
) -> None:
    x = torch.ones(3, 64)
    x[1, 40] = bad
    assert not bound(path, 64, 8, symmetric, 64).quantize(x)[1][1].isfinite()
    layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 24), Scheme(4, 8, activation_symmetric=symmetric))
    y = run(layer, x, path)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


def run(layer: QuantizedLinear, x: torch.Tensor, path: str, *first: Any) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cpu, "chosen", lambda: path)
        y: torch.Tensor = layer(x, *first)
    return y


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    weight_bits, activation_bits = draw(st.sampled_from([(4, 4), (4, 8), (8, 8)]))
    weights = draw(st.sampled_from([("channel", None), ("group", 16), ("group", 48), ("tensor", None)]))
    inputs = draw(st.sampled_from([("token", None), ("group", 8), ("group", 32), ("tensor", None)]))
    return Scheme(weight_bits, activation_bits, *weights, *inputs, draw(st.booleans()))


@every_path
@given(schemes(), st.sampled_from([1, 3, 5, 33]), st.integers(1, 70), st.booleans(), seeds)
@settings(max_examples=100, deadline=None)
def test_a_linear_is_the_reference_within_a_millionth(
    path: str, scheme: Scheme, tokens: int, outputs: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = QuantizedLinear.from_linear(torch.nn.Linear(96, outputs, bias=bias), scheme)
    x = torch.randn(tokens, 96) + 0.3
    terms = x.abs() @ layer.dequantized().abs().T + 1  # what is added up, perhaps to nothing
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        expected = run(layer, x.to(dtype), cpu.REFERENCE)
        found = run(layer, x.to(dtype), path)
        assert found.dtype == dtype
        assert ((found - expected).abs() <= tolerance * terms).all()


@every_path
@given(
    st.sampled_from(get_args(Function)),
    st.booleans(),
    st.sampled_from([(96, 1), (96, 2), (96, 32), (44, 4), (256, 256), (27, 1)]),
    st.sampled_from(["token", "group", "tensor"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    seeds,
)
@settings(max_examples=100, deadline=None)
def test_functions_and_rotations_come_before_the_grid(
    path: str,
    function: Function,
    gated: bool,
    shape: tuple[int, int],
    granularity: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    channels, block = shape
    generator = torch.Generator().manual_seed(seed)
    x, times = (8 * torch.randn(2, 5, channels, generator=generator)).to(dtype)
    exact = ACTIVATIONS[function](x.double()) * (times.double() if gated else 1)
    exact = block_hadamard(exact, block)
    size = {"token": channels, "group": math.gcd(channels, 4), "tensor": 0}[granularity]
    first = function, times if gated else None
    linear = bound(path, channels, 8, True, size, block, outputs=7)
    q, scale, _ = linear.quantize(x, *first)
    grid = scale.repeat_interleave(size or channels, dim=1)
    precision = 1e-6 * float((x.double() * times.double()).abs().max())  # of functions near zero
    assert ((q * grid - exact).abs() <= 0.5001 * grid + precision).all()

    inputs, weight = (q * grid).double(), random_levels(-127, 127, 0, 7, channels).double()
    expected, terms = inputs @ weight.T, inputs.abs() @ weight.abs().T  # what is added up, perhaps to nothing
    rounding = 4e-3 if dtype == torch.bfloat16 else 0
    error = (linear(x, *first).double() - expected).abs()
    assert (error <= 1e-6 * terms + rounding * expected.abs()).all()


@every_path
@pytest.mark.parametrize("function", ["none", "silu", "gelu", "gelu_tanh"])
def test_a_linear_behind_a_function_is_the_reference(path: str, function: Function) -> None:
    torch.manual_seed(0)
    rotated = HadamardLinear(torch.nn.Linear(96, 40, bias=False), 32)
    layer = QuantizedLinear.from_linear(rotated, Scheme(4, 8))
    x, times = torch.randn(2, 3, 5, 96)
    expected, found = (run(layer, x, which, function, times) for which in (cpu.REFERENCE, path))
    assert torch.allclose(found, expected, atol=0.02 * float(expected.std()))


@every_path
def test_no_tokens_give_no_outputs(path: str) -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 24), Scheme(4, 8))
    assert run(layer, torch.ones(2, 0, 64), path).shape == (2, 0, 24)


def test_the_variable_chooses_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = cpu.chosen.__wrapped__  # it looks but once
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    assert choose() == cpu.paths()[0]
    monkeypatch.setenv(cpu.VARIABLE, "portable")
    assert choose() == "portable"
    monkeypatch.setenv(cpu.VARIABLE, "mmx")
    with pytest.raises(InputError, match=r"SQAP_KERNELS is 'mmx'; on this processor it can be .*reference"):
        choose()


@every_path
def test_pytorchs_own_products_and_these_take_turns(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX's tiles are a thread's own, and PyTorch configures them for itself, in bfloat16."""
    monkeypatch.setattr(cpu, "chosen", lambda: path)
    packed = QuantizedLinear.from_linear(torch.nn.Linear(256, 512), Scheme())
    theirs = torch.nn.Linear(256, 512, dtype=torch.bfloat16)
    x = torch.randn(64, 256)
    with torch.inference_mode():
        ours, expected = packed(x), theirs(x.bfloat16())
        for _ in range(20):
            assert torch.equal(theirs(x.bfloat16()), expected)
            assert torch.equal(packed(x), ours)
