"""A whole transformer layer on a GPU: the Triton programs, and PyTorch's attention between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sqap.kernels.backend import LayerSpec, Norm
from sqap.kernels.gpu import programs
from sqap.kernels.gpu.linear import FLOATS, GpuLinear, Levels
from sqap.kernels.received import attention_received

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefix:
    """Keys and values that the tokens of many calls attend to, and room for the tokens' own behind them.

    Args:
        keys, values: ``(batch, kv_heads, length + room, head_dim)``.
        length: of the prefix.
    """

    keys: Tensor
    values: Tensor
    length: int

    def read(self, behind: int) -> tuple[Tensor, Tensor]:
        """The prefix, with so many places ``behind`` it."""
        end = self.length + behind
        return self.keys[:, :, :end], self.values[:, :, :end]


class GpuLayer:
    """A `sqap.kernels.backend.FusedLayer`.

    Norms are computed as their tokens are quantized, which queries, keys and values share, as gate and up do.
    The activation function, the gate's factor and the Hadamard matrix are applied as the MLP's inner values
    are quantized, and gains and residuals as a product is written.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self._inputs, self._up = (
            [cast(GpuLinear, linear) for linear in linears] for linears in (spec.inputs, spec.up)
        )
        self._out, self._down = cast(GpuLinear, spec.out), cast(GpuLinear, spec.down)

    def takes(self, x: Tensor, first: int = 0, past: int = 0) -> bool:
        """Floats, whatever came before; behind a ``first`` token, of one observation."""
        return x.dtype in FLOATS and (not first or len(x) == 1)

    def prefix(self, keys: Tensor, values: Tensor, room: int) -> Prefix:
        """A copy of them with ``room`` behind it; without room, they themselves."""
        if not room:
            return Prefix(keys, values, keys.shape[2])
        larger = [x.new_empty(*x.shape[:2], x.shape[2] + room, x.shape[3]) for x in (keys, values)]
        for place, x in zip(larger, (keys, values), strict=True):
            place[:, :, : x.shape[2]] = x
        return Prefix(larger[0], larger[1], keys.shape[2])

    def __call__(
        self,
        x: Tensor,
        rope: Rope | None = None,
        rows: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
        first: int = 0,
        prefix: object | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `FusedLayer.__call__`."""
        spec, (batch, tokens, width), (heads, _, head_dim) = self.spec, x.shape, self.spec.heads
        if prefix is not None:
            kept = cast(Prefix, prefix).read(0 if spec.cross else tokens)
        q, k, v = self._project(x, rope, kept, first)
        past = k.shape[2] - tokens
        received = None
        if rows is not None:
            received = attention_received(q[:, :, rows], k, rows + past, causal=spec.causal)
        mixed = attend(q, k, v, spec.causal, past + first).transpose(1, 2).reshape(-1, heads * head_dim)
        flat = x[:, first:].reshape(-1, width)
        gain, inner_gain = spec.gains
        flat = self._out.multiply(self._out.quantize(mixed), x.dtype, gain=gain, residual=flat)
        levels = normed(self._up[0], flat, spec.norms[1])
        inner = [linear.multiply(levels, x.dtype) for linear in self._up]
        levels = self._down.quantize(inner[0], spec.function, inner[1] if len(inner) > 1 else None)
        flat = self._down.multiply(levels, x.dtype, gain=inner_gain, residual=flat)
        return flat.view(batch, tokens - first, width), received

    def look(self, x: Tensor, rope: Rope, rows: Tensor) -> Tensor:
        """What ``rows`` would attend to ``(batch, tokens)``, were ``x`` this layer's input."""
        batch, tokens, _ = x.shape
        levels = normed(self._inputs[0], x.reshape(-1, x.shape[-1]), self.spec.norms[0])
        every = torch.arange(batch * tokens, dtype=torch.int64, device=x.device).view(batch, tokens)
        wanted = levels.rows(every[:, rows].flatten())
        angles = cast(Rope, tuple(part.expand(batch, -1, -1)[:, rows] for part in rope))
        q = rotated(self._inputs[0].multiply(wanted, x.dtype), self._head_dim, angles, batch)
        k = rotated(self._inputs[1].multiply(levels, x.dtype), self._head_dim, rope, batch)
        return attention_received(q, k, rows, causal=self.spec.causal)

    @property
    def _head_dim(self) -> int:
        return self.spec.heads[2]

    def _project(
        self, x: Tensor, rope: Rope | None, kept: tuple[Tensor, Tensor] | None, first: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries behind ``first`` ``(batch, heads, tokens, head_dim)``; all keys and values."""
        heads, kv_heads, head_dim = self.spec.heads
        levels = normed(self._inputs[0], x.reshape(-1, x.shape[-1]), self.spec.norms[0])
        if self.spec.cross:
            assert rope is not None, "queries of cross-attention have positions"
            assert kept is not None, "cross-attention has a prefix"
            q = self._inputs[0].multiply(levels, x.dtype)
            return rotated(q, head_dim, rope, len(x)), *kept
        if len(self._inputs) == 1:
            made = self._inputs[0].multiply(levels, x.dtype)
            q, k, v = torch.split(made, [heads * head_dim, *[kv_heads * head_dim] * 2], 1)
            q = q[first:]
        else:
            behind = levels.rows(slice(first, None)) if first else levels
            q, k, v = (
                linear.multiply(given, x.dtype)
                for linear, given in zip(self._inputs, (behind, levels, levels), strict=True)
            )
        return placed(q, k, v, self.spec.heads, len(x), rope, kept)


def normed(linear: GpuLinear, x: Tensor, norm: Norm) -> Levels:
    """A norm of ``x`` ``(tokens, width)`` as the levels that ``linear`` multiplies."""
    if linear.grids.hadamard_block == 1:
        return linear.normed(x, norm)
    width, wide = x.shape[-1:], x.float()
    if norm.rms:
        return linear.quantize(F.rms_norm(wide, width, norm.weight, norm.eps))
    return linear.quantize(F.layer_norm(wide, width, norm.weight, norm.bias, norm.eps))


def rotated(x: Tensor, head_dim: int, rope: Rope, batch: int) -> Tensor:
    """``(batch * tokens, heads * head_dim)``, rotated in place, to ``(batch, heads, tokens, head_dim)``."""
    _, k, _ = placed(x[:0], x, x, (0, x.shape[1] // head_dim, head_dim), batch, rope)
    return k


def placed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: tuple[int, int, int],
    batch: int,
    rope: Rope | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as attention takes them, ``(batch, heads, tokens, head_dim)``.

    Args:
        q: ``(rows, heads * head_dim)`` of the last tokens of the batch, rotated in place.
        k, v: ``(batch * tokens, kv_heads * head_dim)``; keys are rotated in place unless they are kept.
        heads: query heads, key and value heads, and the width of each.
        batch: observations.
        rope: cosines and sines ``(batch or 1, tokens, head_dim)``.
        kept: as `FusedLayer.__call__` has them; they are returned.
    """
    count, kv_count, head_dim = heads
    m, own = len(k), (_by_heads(k, batch, head_dim), _by_heads(v, batch, head_dim))
    tokens = m // batch
    keys, values = own if kept is None else (part[:, :, part.shape[2] - tokens :] for part in kept)
    if m and (rope is not None or kept is not None):
        cos, sin = (k, k) if rope is None else (part.contiguous() for part in rope)
        programs.place[(m, count + kv_count * (1 if kept is None else 2))](
            q, k, v, cos, sin, keys, values, m - len(q), tokens, cos.shape[:-1].numel(),
            q.stride(0), k.stride(0), *keys.stride()[:3],
            HEADS=count, KV_HEADS=kv_count, HEAD=head_dim, TURNED=0 if rope is None else count + kv_count,
            BLOCK=triton.next_power_of_2(max(1, head_dim // 2)), num_warps=1,
        )  # fmt: skip
    keys, values = kept or own
    return _by_heads(q, batch, head_dim), keys, values


def _by_heads(x: Tensor, batch: int, head_dim: int) -> Tensor:
    """``(batch * tokens, heads * head_dim)`` to ``(batch, heads, tokens, head_dim)``."""
    return x.view(batch, -1, x.shape[1] // head_dim, head_dim).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, before: int) -> Tensor:
    """Softmax attention ``(batch, heads, queries, head_dim)``; ``before`` keys precede the queries' own."""
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if causal and before and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(before)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and not before, enable_gqa=q.shape[1] != k.shape[1]
    )
