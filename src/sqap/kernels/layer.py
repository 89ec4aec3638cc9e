"""A whole transformer layer in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqap.kernels import FUNCTIONS, Function, Linear, _native, address


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm; its weight and bias ``(width,)`` are float32 or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool = False


class Layer:
    """A pre-norm layer: ``x + out(attention(inputs(norm1(x))))``, and then the same with an MLP.

    Args:
        inputs: of queries, keys and values, or one linear for all three.
        out: what is done to what attention has mixed.
        up: the MLP's first linear, or its gate's and the one that the gate multiplies.
        down: the MLP's second linear.
        norms: before attention, and before the MLP.
        gains: ``(width,)`` float32 of the two branches, or None.
        function: between the MLP's linears.
        heads: query heads, key and value heads, and the width of each, a multiple of 8.
        causal: whether no token sees those after it.
    """

    def __init__(
        self,
        *,
        inputs: Sequence[Linear],
        out: Linear,
        up: Sequence[Linear],
        down: Linear,
        norms: tuple[Norm, Norm],
        gains: tuple[Tensor | None, Tensor | None],
        function: Function,
        heads: tuple[int, int, int],
        causal: bool,
    ) -> None:
        self._kept = inputs, out, up, down, norms, gains  # the native code has their addresses
        self._native = _native.Layer(
            [linear.native for linear in inputs],
            out.native,
            [linear.native for linear in up],
            down.native,
            *(_native.norm(norm.rms, address(norm.weight), address(norm.bias), norm.eps) for norm in norms),
            *map(address, gains),
            FUNCTIONS.index(function),
            *heads,
            causal,
        )

    def __call__(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        rows: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` ``(batch, tokens, width)`` to the same, and what ``rows`` attend to ``(batch, tokens)``.

        Args:
            x: float32.
            rope: cosines and sines ``(batch, tokens, head_dim)`` of the rotary positions.
            rows: ``(rows,)`` indices of the tokens whose attention is wanted, averaged over heads and rows.
            kept: to be filled with keys and values, float32 ``(batch, kv_heads, tokens, head_dim)``.
        """
        (batch, tokens, _), x = x.shape, x.contiguous()
        y, wanted, received = torch.empty_like(x), None, None
        if rows is not None:
            wanted = torch.zeros(tokens, dtype=torch.uint8).index_fill_(0, rows.cpu(), 1)
            received = x.new_empty(batch, tokens)
        cos, sin = (None, None) if rope is None else (part.float().contiguous() for part in rope)
        self._native(
            x.data_ptr(),
            y.data_ptr(),
            batch,
            tokens,
            *map(address, (cos, sin, wanted, received, *(kept or (None, None)))),
        )
        return y, received
