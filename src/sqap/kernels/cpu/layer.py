"""A whole transformer layer in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sqap.kernels import cpu
from sqap.kernels.backend import FUNCTIONS, LayerSpec, Norm
from sqap.kernels.cpu import _native, array

LANES = 8  # heads are multiples of this many channels wide


@dataclass(frozen=True)
class CpuPrefix:
    """What `CpuLayer.prefix` makes; the native code has the address of its ``tiles``."""

    native: object
    tiles: Tensor


class CpuLayer:
    """A `sqap.kernels.backend.FusedLayer` whose parameters are contiguous float32.

    Raises:
        ValueError: the linears or parameters do not fit together.
    """

    def __init__(self, spec: LayerSpec) -> None:
        inputs, up = (
            [cast(cpu.CpuLinear, linear) for linear in linears] for linears in (spec.inputs, spec.up)
        )
        out, down = cast(cpu.CpuLinear, spec.out), cast(cpu.CpuLinear, spec.down)
        for parameter in spec.parameters:
            _check("a norm's or branch's parameter", parameter, (out.out_features,))
        self.path, self.head_dim, self._heads = out.path, spec.heads[2], spec.heads
        self._width = out.out_features
        self._kept = spec  # the native code has its tensors' addresses
        self.native = _native.Layer(
            [linear.native for linear in inputs],
            out.native,
            [linear.native for linear in up],
            down.native,
            *map(_norm, spec.norms),
            *map(array, spec.gains),
            FUNCTIONS.index(spec.function),
            *spec.heads,
            spec.causal,
            spec.cross,
        )

    def takes(self, x: Tensor, first: int = 0, past: int = 0) -> bool:
        """Float32 on the CPU, the first tokens there are; behind a ``first`` token, of one observation."""
        return x.is_cpu and x.dtype == torch.float32 and (not first or len(x) == 1) and not past

    def prefix(self, keys: Tensor, values: Tensor, room: int) -> CpuPrefix:
        """As `FusedLayer.prefix`, of at least one token, in float32 on the CPU.

        Raises:
            ValueError: the tensors do not fit the layer.
        """
        (batch, _, length, _), (_, kv_heads, head_dim) = keys.shape, self._heads
        keys, values = keys.contiguous(), values.contiguous()
        for name, part in (("keys", keys), ("values", values)):
            _check(f"a prefix's {name}", part, (batch, kv_heads, length, head_dim))
        blocks = 2, batch * kv_heads, _native.block(length + room, head_dim)
        tiles = torch.empty(blocks, dtype=torch.float32, device="cpu")
        native = _native.pack(self.native, array(keys), array(values), batch, length, room, array(tiles))
        return CpuPrefix(native, tiles)

    def __call__(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        rows: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
        first: int = 0,
        prefix: object | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `FusedLayer.__call__`.

        Raises:
            ValueError: the tensors do not fit together.
        """
        (batch, tokens, _), x = x.shape, x.contiguous()
        _check("inputs", x, (batch, tokens, self._width))
        _, kv_heads, head_dim = self._heads
        cos = sin = wanted = received = None
        if rope is not None:
            cos, sin = (_angles(part, (batch, tokens, head_dim)) for part in rope)
        if rows is not None:
            wanted = _marked(rows, tokens)
            received = x.new_empty(batch, tokens)
        for part in kept or ():
            _check("room for keys and values", part, (batch, kv_heads, tokens, head_dim))
        y = x.new_empty(batch, tokens - first, self._width)
        given = cos, sin, wanted, received, *(kept or (None, None))
        packed = None if prefix is None else cast(CpuPrefix, prefix).native
        self.native(array(x), array(y), batch, tokens, *map(array, given), first, packed)
        return y, received


def look(layers: Sequence[CpuLayer], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """What ``rows`` would attend to in later layers, were ``x`` ``(1, tokens, width)`` their input.

    As `sqap.kernels.backend.Backend.look`, of float32 and layers with linears of their own for queries and
    keys.

    Raises:
        ValueError: the tensors do not fit together, or there are no layers.
    """
    (batch, tokens, width), x = x.shape, x.contiguous()
    _check("inputs", x, (1, tokens, width))
    cos, sin = (_angles(part, (batch, tokens, layers[0].head_dim)) for part in rope)
    wanted = _marked(rows, tokens)
    received = x.new_empty(batch, tokens)
    natives = [layer.native for layer in layers]
    _native.look(natives, array(x), tokens, *map(array, (cos, sin, wanted, received)))
    return received


def _norm(norm: Norm) -> object:
    return _native.norm(norm.rms, array(norm.weight), array(norm.bias), norm.eps)


def _angles(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cosines or sines, with one row for every token of the batch."""
    if part.shape != shape and part.shape != (1, *shape[1:]):
        raise ValueError(f"rotary positions {tuple(part.shape)} do not fit tokens that need {shape}")
    return part.float().expand(shape).contiguous()


def _marked(rows: Tensor, tokens: int) -> Tensor:
    """1 for the tokens that ``rows`` names, else 0: ``(tokens,)`` uint8."""
    return torch.zeros(tokens, dtype=torch.uint8, device="cpu").index_fill_(0, rows.cpu(), 1)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 on the CPU, got {tensor.dtype}")
