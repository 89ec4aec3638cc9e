"""The quantized linear against plain arithmetic."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from sqap.kernels import cpu, reference
from sqap.kernels.hadamard import block_hadamard
from sqap.kernels.levels import dequantize_activation, level_range, quantize_activation
from sqap.kernels.packing import pack_int4
from sqap.kernels.reference import integer_matmul
from sqap.quantization import QuantizedLinear
from sqap.quantization.gptq import Hessian
from sqap.quantization.grid import clip_scale, quantize_weight
from sqap.quantization.rotation import HadamardLinear
from sqap.recipe import Scheme

SCHEMES = [
    Scheme(4, 8),
    Scheme(4, 4, activation_granularity="tensor"),
    Scheme(8, 8, weight_granularity="tensor"),
    Scheme(4, 8, weight_granularity="group", group_size=16),
    Scheme(8, 8, weight_granularity="group", group_size=32),
    Scheme(4, 8, activation_symmetric=False),
    Scheme(4, 4, activation_granularity="group", activation_group_size=16),
    Scheme(4, 4, "group", 16, "tensor", activation_symmetric=False),
]


def random_linear(inputs: int = 64, outputs: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    weight_bits, activation_bits = draw(st.sampled_from([(4, 4), (4, 8), (8, 8)]))
    granularity, group_size = draw(st.sampled_from([("channel", None), ("group", 16), ("tensor", None)]))
    activations = draw(st.sampled_from([("token", None), ("group", 8), ("tensor", None)]))
    return Scheme(weight_bits, activation_bits, granularity, group_size, *activations, draw(st.booleans()))


@pytest.mark.parametrize("path", cpu.paths())
@given(schemes(), st.sampled_from([0, 16]), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_forward_is_dequantize_and_multiply(
    path: str, scheme: Scheme, block: int, clip: bool, seed: int
) -> None:
    source = random_linear()
    linear = HadamardLinear(source, block) if block else source
    quantized = QuantizedLinear.from_linear(linear, scheme, clip=clip)
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(seed)) + 1
    x = (1024 * x).round() / 1024  # rotated exactly, whatever the order of sums: ties are rounded alike
    rotated = block_hadamard(x, block) if block else x
    activations = dequantize_activation(
        *quantize_activation(
            rotated,
            scheme.activation_bits,
            scheme.activation_granularity,
            scheme.activation_symmetric,
            scheme.activation_group_size,
        )
    )
    expected = activations.double() @ quantized.dequantized().double().T + source.bias.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "chosen", lambda: path)
        found = quantized(x)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "inputs"), [((4, 8), 20000), ((8, 8), 2100), ((4, 4), 64)])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("path", cpu.paths())
def test_sums_are_exact_however_large(
    symmetric: bool,
    bits: tuple[int, int],
    inputs: int,
    granularity: Any,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "chosen", lambda: path)
    scheme = Scheme(*bits, granularity, activation_symmetric=symmetric)
    quantized = QuantizedLinear(inputs, 5, scheme)
    low, high = level_range(bits[0])
    levels = torch.randint(low, high + 1, (5, inputs), generator=torch.Generator().manual_seed(0)).char()
    levels[0] = low
    quantized.weight = pack_int4(levels) if bits[0] == 4 else levels
    quantized.scale = torch.rand(quantized.scale.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(2))
    x[0], x[0, 3] = -1, 0  # as far from the zero point as can be
    q, scale, zero_point = quantize_activation(x, bits[1], "token", symmetric)
    sums = (q.long() - (0 if zero_point is None else zero_point)) @ levels.long().T
    assert inputs == 64 or sums[0, 0] > 2**24
    assert torch.equal(quantized(x), sums.float() * scale * quantized.scale.T)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_large_weight_is_unpacked_in_blocks(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = QuantizedLinear.from_linear(random_linear(), scheme)
    x = torch.randn(2, 3, 64)
    monkeypatch.setattr(cpu, "chosen", lambda: cpu.REFERENCE)
    whole = quantized(x)
    monkeypatch.setattr(reference, "BLOCK", 7 * 64)
    torch.testing.assert_close(quantized(x), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_stored_as_integers(scheme: Scheme) -> None:
    source = random_linear()
    quantized = QuantizedLinear.from_linear(source, scheme)
    q, scale = quantize_weight(
        source.weight, scheme.weight_bits, scheme.weight_granularity, scheme.group_size
    )
    assert torch.equal(quantized.weight, pack_int4(q) if scheme.weight_bits == 4 else q)
    assert torch.equal(quantized.scale, scale)
    assert quantized.weight.nbytes == 64 * 24 * scheme.weight_bits // 8
    assert not list(quantized.parameters())


@pytest.mark.parametrize("levels", [7, 127])
@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 256, 64), (5, 7, 3), (40, 640, 48), (20, 2100, 16)])
def test_products_are_exact_integers(levels: int, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-levels, levels + 1, (rows, inputs), generator=generator)
    weight = torch.randint(-levels, levels + 1, (outputs, inputs), generator=generator)
    q[0], weight[0] = levels, levels  # where 16-bit sums would saturate
    found = integer_matmul(q.to(torch.int8), weight.to(torch.int8), levels**2)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), q @ weight.T)


@torch.no_grad()
def test_rotation_rescues_four_bits_from_outliers() -> None:
    gain = torch.ones(256)
    gain[[3, 70, 200]] = 10
    source = random_linear(256, 256, bias=False)
    source.weight /= gain  # the outliers are large, but say no more than any other channel
    rotated = nn.Linear(256, 256, bias=False)
    rotated.weight.copy_(block_hadamard(source.weight, 256))
    x = gain * torch.randn(50, 256)

    def error(linear: nn.Linear) -> float:
        quantized = QuantizedLinear.from_linear(linear, Scheme(4, 4))
        return float((quantized(x) - source(x)).norm() / source(x).norm())

    assert error(HadamardLinear(rotated, 256)) < 0.5 * error(source)


@torch.no_grad()
def test_a_zero_point_suits_inputs_that_lean_to_one_side() -> None:
    source = random_linear(256, 64)
    x = torch.nn.functional.gelu(3 * torch.randn(50, 256))

    def error(scheme: Scheme) -> float:
        return float((QuantizedLinear.from_linear(source, scheme)(x) - source(x)).norm())

    source.weight.copy_(torch.randint(-7, 8, source.weight.shape))
    source.weight[:, 0] = 7  # on the grid already: all of the error is the activations'
    assert error(Scheme(4, 4, activation_symmetric=False)) < 0.65 * error(Scheme(4, 4))


@torch.no_grad()
def test_gptq_and_clip_search_are_what_they_are_asked_for() -> None:
    source = random_linear()
    x = torch.randn(200, 64) @ torch.randn(64, 64)
    hessian = Hessian(torch.arange(64))
    hessian.add(x)
    nearest = QuantizedLinear.from_linear(source, Scheme())
    clipped = QuantizedLinear.from_linear(source, Scheme(), clip=True)
    factor = hessian.factor()
    by_gptq = QuantizedLinear.from_linear(source, Scheme(), clip=True, factor=factor)
    assert torch.equal(clipped.scale, clip_scale(source.weight, 4, "channel"))
    assert torch.equal(by_gptq.scale, clip_scale(source.weight, 4, "channel", None, factor.importance))
    uncut = QuantizedLinear.from_linear(source, Scheme(), factor=factor)
    assert torch.equal(uncut.scale, nearest.scale)

    def weight_error(linear: QuantizedLinear) -> float:
        return float((linear.dequantized() - source.weight).norm())

    def output_error(linear: QuantizedLinear) -> float:
        return float((x @ (linear.dequantized() - source.weight).T).norm())

    assert weight_error(clipped) < weight_error(nearest) < weight_error(by_gptq)
    assert output_error(by_gptq) < 0.8 * output_error(clipped)


def test_zero_inputs_give_the_bias() -> None:
    source = random_linear()
    quantized = QuantizedLinear.from_linear(source, Scheme(4, 4))
    assert torch.equal(quantized(torch.zeros(3, 64)), source.bias.detach().expand(3, -1))


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_casting_a_model_keeps_its_scales(cast: Callable[[nn.Module], nn.Module]) -> None:
    quantized = QuantizedLinear.from_linear(random_linear(), Scheme())
    scale, weight = quantized.scale.clone(), quantized.weight.clone()
    cast(quantized)
    assert quantized.scale.dtype == torch.float32
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.weight, weight)
    assert quantized.bias is not None
    x = torch.randn(3, 64).to(quantized.bias.dtype)
    assert quantized(x).dtype == x.dtype


def test_a_linear_can_be_moved_to_the_meta_device() -> None:
    quantized = QuantizedLinear.from_linear(random_linear(), Scheme()).to("meta")
    assert quantized.weight.is_meta
    assert quantized.scale.is_meta
    assert not quantized.to_empty(device="cpu").scale.is_meta


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_state_dict_round_trip_is_exact(scheme: Scheme) -> None:
    source = random_linear()
    saved = QuantizedLinear.from_linear(source, scheme)
    loaded = QuantizedLinear.empty_like(random_linear(), scheme)
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(loaded(x), saved(x))
