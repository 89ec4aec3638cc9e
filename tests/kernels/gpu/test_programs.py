"""The Triton programs in Triton's interpreter, against the reference arithmetic."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is there for Linux alone")

from sqap.errors import InputError  # noqa: E402
from sqap.kernels import FUNCTIONS, Grids, Norm, Packed  # noqa: E402
from sqap.kernels.gpu import GpuBackend  # noqa: E402
from sqap.kernels.gpu.linear import GpuLinear, Levels  # noqa: E402
from sqap.kernels.hadamard import block_hadamard  # noqa: E402
from sqap.kernels.levels import quantize_activation  # noqa: E402
from sqap.kernels.reference import ACTIVATIONS, ReferenceLinear  # noqa: E402

SCHEMES = {"w4a8": (4, 8), "w8a8": (8, 8), "w4a4": (4, 4)}
EPS = 0.1  # large enough to be seen
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(
    k: int, n: int, scheme: str, *, hadamard: int = 1, bias: bool = True, tensor: bool = False
) -> Packed:
    """Random levels; scales of 4 bits have either sign."""
    bits, activation_bits = SCHEMES[scheme]
    if bits == 4:
        weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    else:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = torch.rand((1, 1) if tensor else (n, 1)) + 0.5
    if bits == 4:
        scale = scale * torch.randn_like(scale).sign()
    grids = Grids(bits, activation_bits, True, k, hadamard)
    return Packed(weight, scale, torch.randn(n) if bias else None, grids)


def in_order(levels: Levels, given: Packed) -> Tensor:
    """Levels in the order of their channels."""
    if given.grids.weight_bits == 8:
        return levels.q
    half = levels.q.shape[1] // 2
    return torch.stack([levels.q[:, :half], levels.q[:, half:]], 2).flatten(1)


def assert_levels(levels: Levels, given: Packed, wide: Tensor) -> None:
    """Those of the float32 values ``wide``, but for ties that a last bit decides."""
    bits = given.grids.activation_bits
    expected, scale, _ = quantize_activation(wide, bits, "token")
    off = (in_order(levels, given).int() - expected.int()).abs()
    assert off.numel() == 0 or (off.max() <= 1 and (off > 0).float().mean() < 2e-3)
    torch.testing.assert_close(levels.scale, scale[:, 0], rtol=3e-6, atol=0)


@given(
    st.sampled_from(list(SCHEMES)),
    st.integers(0, 70),
    st.integers(1, 400).map(lambda half: 2 * half),
    st.integers(1, 150),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
@example("w4a8", 0, 64, 32, True, False, 0)
@example("w4a8", 1, 1216, 33, True, False, 0)
@example("w8a8", 17, 192, 65, False, True, 1)
@example("w4a4", 70, 256, 64, True, False, 2)
@settings(max_examples=12, deadline=None)
def test_a_linear_is_the_references(
    scheme: str, m: int, k: int, n: int, bias: bool, tensor: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    given_, x = packed(k, n, scheme, bias=bias, tensor=tensor), torch.randn(m, k)
    expected, found = ReferenceLinear(given_)(x), GpuLinear(given_)(x)
    assert found.shape == (m, n)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()) if m else 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sums_are_exact(scheme: str) -> None:
    """All levels at their ends, over as many channels as there may be: no sum is rounded or wraps around."""
    k, n = 32768, 3
    given_ = packed(k, n, scheme, bias=False)
    ends = torch.tensor([0, 255]) if given_.grids.weight_bits == 4 else torch.tensor([-127, 127])
    given_.weight.copy_(ends[torch.randint(0, 2, given_.weight.shape)])
    given_.weight[0] = given_.weight[0, 0]  # the largest sum there is
    given_.scale.fill_(1)
    largest = 127 if given_.grids.activation_bits == 8 else 7
    q = torch.full((2, k), -largest, dtype=torch.int8)
    q[1, ::3] = largest
    levels = Levels(q, torch.ones(2))
    weight = given_.weight.long()
    if given_.grids.weight_bits == 4:
        weight = torch.cat([weight & 15, weight >> 4], 1) - 8
    expected = (q.long() @ weight.T).float()
    torch.testing.assert_close(GpuLinear(given_).multiply(levels, torch.float32), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_the_epilogue(dtype: torch.dtype, gain: bool, residual: bool) -> None:
    torch.manual_seed(0)
    m, k, n = 19, 96, 70
    given_ = packed(k, n, "w4a8")
    linear, x = GpuLinear(given_), torch.randn(m, k).to(dtype)
    levels = linear.quantize(x)
    plain = linear.multiply(levels, torch.float32)
    by, base = torch.randn(n).to(dtype) if gain else None, torch.randn(m, n).to(dtype) if residual else None
    found = linear.multiply(levels, dtype, gain=by, residual=base)
    expected = (plain if by is None else plain * by.float()) + (0 if base is None else base.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))


def test_types_of_inputs() -> None:
    """Only the result is rounded."""
    given_ = packed(128, 24, "w4a8")
    for dtype in DTYPES:
        x = torch.randn(2, 3, 128).to(dtype)
        torch.testing.assert_close(GpuLinear(given_)(x), ReferenceLinear(given_)(x), rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="do not fit a weight of 128 channels"):
        GpuLinear(given_)(torch.randn(2, 3, 128).double())
    with pytest.raises(ValueError, match="do not fit a weight of 128 channels"):
        GpuLinear(given_)(torch.randn(2, 64))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("k", "block"),
    [(96, 1), (2050, 1), (512, 2), (512, 4), (512, 8), (512, 16), (512, 32), (1344, 64), (1024, 128),
     (768, 256), (1024, 512), (2048, 2048)],
)  # fmt: skip
def test_an_activation_quantized(function: Any, k: int, block: int) -> None:
    torch.manual_seed(k + block)
    given_ = packed(k, 16, "w4a8" if block != 16 else "w8a8", hadamard=block)
    x, times = torch.randn(3, k), torch.randn(3, k)
    for factor in (None, times):
        wide = ACTIVATIONS[function](x) * (1 if factor is None else factor)
        assert_levels(GpuLinear(given_).quantize(x, function, factor), given_, block_hadamard(wide, block))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("k", [6, 130, 1152])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_quantized(scheme: str, k: int, rms: bool, affine: bool) -> None:
    torch.manual_seed(k)
    given_, x = packed(k, 16, scheme), torch.randn(5, k) * 3 + 1
    weight, bias = (torch.randn(k), torch.randn(k)) if affine else (None, None)
    if rms:
        expected = torch.nn.functional.rms_norm(x, (k,), weight, EPS)
        norm = Norm(weight, None, EPS, rms=True)
    else:
        expected, norm = torch.nn.functional.layer_norm(x, (k,), weight, bias, EPS), Norm(weight, bias, EPS)
    assert_levels(GpuLinear(given_).normed(x, norm), given_, expected)


def test_ties_and_zeros() -> None:
    """Halves go to the even level; a token of zeros has a scale above zero."""
    given_ = packed(6, 1, "w8a8")
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    levels = GpuLinear(given_).quantize(x)
    assert levels.q.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert levels.scale[0] == 1
    assert levels.scale[1] > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen_behind_the_product(value: float) -> None:
    for scheme in SCHEMES:
        x = torch.randn(3, 64)
        x[1, 7] = value
        linear = GpuLinear(packed(64, 8, scheme))
        for levels in (linear.quantize(x), linear.normed(x, Norm(None, None, 1e-6))):
            found = linear.multiply(levels, torch.float32)
            assert not found[1].isfinite().any()
            assert found[[0, 2]].isfinite().all()


def test_every_byte_is_two_levels() -> None:
    """The two formulas that the assembly computes for four bytes at a time."""
    w = torch.arange(256)
    even, odd = (((x & 0xF0) ^ 0x80).to(torch.uint8).view(torch.int8).int() for x in (w << 4, w))
    assert torch.equal(even, 16 * ((w & 15) - 8).int())
    assert torch.equal(odd, 16 * ((w >> 4) - 8).int())
    # lop3's table 0x6A is (a & b) ^ c, of a = 0xF0, b = 0xCC and c = 0xAA.
    assert (0xF0 & 0xCC) ^ 0xAA == 0x6A


def test_grids_without_a_kernel_are_refused() -> None:
    plain = packed(128, 32, "w4a8")
    backend = GpuBackend()
    assert isinstance(backend.linear(plain), GpuLinear)
    groups = replace(plain, scale=torch.ones(32, 4))
    for given_, words in (
        (groups, "weights with a scale per group of 32 channels have no kernel"),
        (
            replace(plain, grids=replace(plain.grids, group_size=32)),
            "activations with a scale per group of 32",
        ),
        (replace(plain, grids=replace(plain.grids, group_size=0)), "activations with one scale per tensor"),
        (replace(plain, grids=replace(plain.grids, symmetric=False)), "activations with a zero point"),
    ):
        with pytest.raises(InputError, match=f"on GPUs, {words}") as caught:
            backend.linear(given_)
        assert "SQAP_KERNELS=reference" in str(caught.value)
    wide = packed(32770, 2, "w4a8")
    with pytest.raises(InputError, match="more than 32768 input channels, here 32770,"):
        backend.linear(wide)


ROOT = Path(__file__).parents[3]
GUARDED = """
import torch
from sqap.kernels import Grids, Norm, Packed
from sqap.kernels.gpu import linear as module
from sqap.kernels.gpu.layer import placed
from sqap.kernels.gpu.linear import GpuLinear
from tests.kernels.guarded import guarded

class Empty:
    # What the programs write to is guarded, too.
    def __getattr__(self, name):
        return getattr(torch, name)
    def empty(self, *shape, **options):
        return guarded(torch.zeros(*shape, **options))

module.torch = Empty()
for bits in (4, 8):
    for m, k, n in ((1, 34, 5), (3, 130, 65), (17, 258, 33)):
        weight = guarded(torch.randint(0, 256, (n, k // 2 if bits == 4 else k), dtype=torch.uint8))
        weight = weight if bits == 4 else weight.view(torch.int8)
        one, scale, x = guarded(torch.ones(k)), guarded(torch.ones(n, 1)), guarded(torch.randn(m, k))
        gain, bias, residual = guarded(torch.ones(n)), guarded(torch.ones(n)), guarded(torch.ones(m, n))
        linear = GpuLinear(Packed(weight, scale, bias, Grids(bits, 8, True, k, 2)))
        assert linear.scale.data_ptr() == scale.data_ptr()
        linear.multiply(linear.quantize(x, "silu", x), torch.float32, gain=gain, residual=residual)
        linear.normed(x, Norm(one, one, 1e-6))
q, k, v, angles = (guarded(torch.randn(*shape)) for shape in ((6, 30), (6, 10), (6, 10), (1, 3, 10)))
placed(q, k, v, (3, 1, 10), 2, (angles, angles))
kept = [guarded(torch.zeros(2, 1, 5, 10)) for _ in range(2)]
placed(q, k, v, (3, 1, 10), 2, (angles, angles), kept)
placed(guarded(torch.randn(2, 30)), k, v, (3, 1, 10), 1, None, [guarded(torch.zeros(1, 1, 6, 10))] * 2)
print("done")
"""


def test_nothing_is_read_or_written_beyond_an_array() -> None:
    found = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "done\n", found.stderr
