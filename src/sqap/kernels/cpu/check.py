"""Whether a path computes on this processor what plain C++ does, by small products and layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import get_args

import torch
from torch import Tensor

from sqap.kernels import cpu
from sqap.kernels.backend import Function, Grids, LayerSpec, Norm, Packed
from sqap.kernels.cpu.layer import CpuLayer, look

CHANNELS, OUTPUTS, GROUP = 64, 40, 32
TOKENS = 3, 37  # rows are multiplied one by one for few tokens, in tiles for many
# What shares a scale of weights, and of activations.
SCALES = (
    ("channel", "token"),
    ("channel", "group"),
    ("channel", "tensor"),
    ("group", "token"),
    ("group", "group"),
    ("tensor", "token"),
)
HEAD = 8  # channels of a head
DEEP = 1100  # channels, more than are unpacked at a time


@dataclass(frozen=True)
class _Case:
    """Something to compute, the same on every path.

    Args:
        name: what it is.
        run: a path to tensors. Integers must be equal.
        tolerance: between floats, as a share of the largest.
    """

    name: str
    run: Callable[[str], list[Tensor]]
    tolerance: float = 1e-5


@dataclass(frozen=True)
class _Grids:
    """How weights and activations are quantized; ``weights`` and ``inputs`` say what shares a scale."""

    weight_bits: int
    activation_bits: int
    weights: str = "channel"
    inputs: str = "token"
    symmetric: bool = True
    hadamard: int = 1

    def __str__(self) -> str:
        zero = "" if self.symmetric else " with zero points"
        bits = f"W{self.weight_bits}A{self.activation_bits}"
        return f"a {bits} linear, scales per {self.weights} and per {self.inputs}{zero}"

    def linear(self, path: str, inputs: int = CHANNELS, outputs: int = OUTPUTS) -> cpu.CpuLinear:
        """The same weights for every path."""
        shape = {"channel": (outputs, 1), "group": (outputs, inputs // GROUP), "tensor": (1, 1)}
        size = {"token": inputs, "group": GROUP, "tensor": 0}[self.inputs]
        packed = Packed(
            _weight(self.weight_bits, outputs, inputs),
            (_floats(*shape[self.weights]) + 4) / (inputs << self.weight_bits),
            _floats(outputs),
            Grids(self.weight_bits, self.activation_bits, self.symmetric, size, self.hadamard),
        )
        return cpu.CpuLinear(packed, path)


@cache
def difference(path: str) -> str | None:
    """The first thing that ``path`` computes otherwise than plain C++ does; None if there is none."""
    if path in (cpu.PORTABLE, cpu.REFERENCE):
        return None
    for case in _cases():
        try:
            pairs = zip(case.run(path), case.run(cpu.PORTABLE), strict=True)
            if not all(_same(found, expected, case.tolerance) for found, expected in pairs):
                return case.name
        except (ValueError, RuntimeError, MemoryError) as error:
            return f"{case.name} ({error})"
    return None


def _same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if torch.equal(found, expected):
        return True
    if not expected.is_floating_point():
        return False
    apart = (found.float() - expected.float()).abs().max()
    return bool(apart <= tolerance * expected.abs().max())  # not so where one is no number


def _cases() -> Iterator[_Case]:
    for bits, channels in product((4, 8), (CHANNELS, DEEP)):
        yield _Case(f"products with {bits}-bit weights", partial(_products, bits, channels))
    for scheme, scales, symmetric in product(((4, 8), (4, 4), (8, 8)), SCALES, (True, False)):
        grids = _Grids(*scheme, *scales, symmetric)
        yield _Case(str(grids), partial(_linear, grids))
    # From here on, a level more or less may come of a function's last bit.
    for function in get_args(Function):
        yield _Case(f"a linear behind the function {function!r}", partial(_behind, function), tolerance=0.02)
    yield _Case("a decoder layer", partial(_layer, True), tolerance=0.02)
    yield _Case("an encoder block", partial(_layer, False), tolerance=0.02)
    yield _Case("a look ahead", _look, tolerance=0.02)
    for cross in (False, True):
        yield _Case("an expert's layer", partial(_behind_prefix, cross), tolerance=0.02)


def _products(bits: int, channels: int, path: str) -> list[Tensor]:
    """Of the largest levels there are, too."""
    q = _levels(8, TOKENS[-1], channels)
    return [cpu.matmul(q[:tokens], _weight(bits, OUTPUTS, channels), bits, path) for tokens in TOKENS]


def _linear(grids: _Grids, path: str) -> list[Tensor]:
    """Levels, scales, zero points and outputs."""
    linear, x = grids.linear(path), _floats(TOKENS[-1], CHANNELS)
    on_grids = [tensor for tensor in linear.quantize(x) if tensor is not None]
    return [*on_grids, *(linear(x[:tokens]) for tokens in TOKENS)]


def _behind(function: Function, path: str) -> list[Tensor]:
    """A function, a product and a Hadamard matrix before the grid: values on it, and outputs."""
    linear, results = _Grids(4, 8, hadamard=GROUP).linear(path), []
    for dtype in (torch.float32, torch.bfloat16):
        x, times = _floats(2, 5, CHANNELS).to(dtype)
        q, scale, _ = linear.quantize(x, function, times)
        results += [q * scale, linear(x, function, times)]
    return results


def _layer(decoder: bool, path: str) -> list[Tensor]:
    """Outputs, and of a decoder's layer what rows attend to, keys and values."""
    layer, x = _bound(decoder, path), _floats(2, TOKENS[-1], CHANNELS)
    if not decoder:
        return [layer(x)[0]]
    rope, rows = _seen()
    room = torch.empty(2, 2, 2, TOKENS[-1], HEAD, dtype=torch.float32, device="cpu")
    y, received = layer(x, rope, rows, (room[0], room[1]))
    return [y, room] if received is None else [y, received, room]


def _behind_prefix(cross: bool, path: str) -> list[Tensor]:
    """Outputs of an action expert's layer."""
    layer, prefix = _bound(True, path, cross), _floats(2, 2, TOKENS[-1], HEAD)
    packed = layer.prefix(prefix, prefix.flip(2), TOKENS[-1])
    return [layer(_floats(2, TOKENS[-1], CHANNELS), _seen()[0], prefix=packed)[0]]


def _look(path: str) -> list[Tensor]:
    """What rows would attend to in two layers."""
    return [look([_bound(True, path)] * 2, _floats(1, TOKENS[-1], CHANNELS), *_seen())]


def _seen() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Rotary positions, and rows whose attention is wanted."""
    angles = _floats(1, TOKENS[-1], HEAD)
    return (angles.cos(), angles.sin()), torch.tensor([3, TOKENS[-1] - 1], device="cpu")


def _bound(decoder: bool, path: str, cross: bool = False) -> CpuLayer:
    """A decoder's layer, with queries alone if ``cross``, or a block of an encoder."""
    heads, width = 4, HEAD
    kv_heads = 2 if decoder else heads
    linear = partial(_Grids(8, 8).linear, path)
    queries, keys = heads * width, kv_heads * width
    inputs = (queries,) if cross else (queries, keys, keys) if decoder else (3 * queries,)
    one = _floats(CHANNELS)
    norm = Norm(one, None if decoder else one, 1e-5, rms=decoder)
    spec = LayerSpec(
        inputs=[linear(CHANNELS, n) for n in inputs],
        out=linear(queries, CHANNELS),
        up=[linear(CHANNELS, 2 * CHANNELS)] * (2 if decoder else 1),
        down=linear(2 * CHANNELS, CHANNELS),
        norms=(norm, norm),
        gains=(None, None) if decoder else (one, one),
        function="silu" if decoder else "gelu",
        heads=(heads, kv_heads, width),
        causal=decoder and not cross,
        cross=cross,
    )
    return CpuLayer(spec)


@cache
def _floats(*shape: int) -> Tensor:
    """Normally distributed, the same every time, whatever PyTorch's defaults are. Not to be changed."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _levels(bits: int, rows: int, channels: int) -> Tensor:
    """Levels ``(rows, channels)`` of so many bits; the first row is as low as can be."""
    low = -(1 << bits - 1)
    generator = torch.Generator("cpu").manual_seed(1)
    levels = torch.randint(low, -low, (rows, channels), generator=generator, dtype=torch.int8, device="cpu")
    levels[0] = low
    return levels


@cache
def _weight(bits: int, outputs: int, inputs: int) -> Tensor:
    """As it is stored. Not to be changed."""
    levels = _levels(bits, outputs, inputs)
    if bits == 8:
        return levels
    pairs = (levels + 8).to(torch.uint8).view(outputs, -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4
