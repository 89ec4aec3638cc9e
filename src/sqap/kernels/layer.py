"""A whole transformer layer in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqap.kernels import FUNCTIONS, Function, Linear, _native, array


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
        parameters = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
        for parameter in (*parameters, *gains):
            if parameter is not None:
                _check("a norm's or branch's parameter", parameter, (out.out_features,))
        self.path, self.head_dim, self._width, self._heads = out.path, heads[2], out.out_features, heads
        self._kept = inputs, out, up, down, norms, gains  # the native code has their addresses
        self.native = _native.Layer(
            [linear.native for linear in inputs],
            out.native,
            [linear.native for linear in up],
            down.native,
            *(_native.norm(norm.rms, array(norm.weight), array(norm.bias), norm.eps) for norm in norms),
            *map(array, gains),
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
        first: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` ``(batch, tokens, width)`` to the same, and what ``rows`` attend to ``(batch, tokens)``.

        Args:
            x: float32.
            rope: cosines and sines of the rotary positions, ``(batch, tokens, head_dim)``, or ``(1, tokens,
                head_dim)`` where they are the same for the whole batch.
            rows: ``(rows,)`` indices of the tokens whose attention is wanted, averaged over heads and rows.
            kept: to be filled with keys and values, float32 ``(batch, kv_heads, tokens, head_dim)``.
            first: tokens before it give keys and values alone, and are missing in what is returned; of a
                batch of one.

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
            wanted = torch.zeros(tokens, dtype=torch.uint8, device="cpu").index_fill_(0, rows.cpu(), 1)
            received = x.new_empty(batch, tokens)
        for part in kept or ():
            _check("room for keys and values", part, (batch, kv_heads, tokens, head_dim))
        y = x.new_empty(batch, tokens - first, self._width)
        given = cos, sin, wanted, received, *(kept or (None, None))
        self.native(array(x), array(y), batch, tokens, *map(array, given), first)
        return y, received


def look(layers: Sequence[Layer], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """What ``rows`` would attend to in later layers, were ``x`` ``(1, tokens, width)`` their input.

    Args:
        layers: with linears of their own for queries and keys.
        x: float32.
        rope: cosines and sines of the rotary positions, ``(1, tokens, head_dim)``.
        rows: ``(rows,)`` indices of the tokens that ask.

    Returns:
        ``(1, tokens)`` averaged over layers, heads and rows.

    Raises:
        ValueError: the tensors do not fit together, or there are no layers.
    """
    (batch, tokens, width), x = x.shape, x.contiguous()
    _check("inputs", x, (1, tokens, width))
    cos, sin = (_angles(part, (batch, tokens, layers[0].head_dim)) for part in rope)
    wanted = torch.zeros(tokens, dtype=torch.uint8, device="cpu").index_fill_(0, rows.cpu(), 1)
    received = x.new_empty(batch, tokens)
    natives = [layer.native for layer in layers]
    _native.look(natives, array(x), tokens, *map(array, (cos, sin, wanted, received)))
    return received


def _angles(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cosines or sines, with one row for every token of the batch."""
    if part.shape != shape and part.shape != (1, *shape[1:]):
        raise ValueError(f"rotary positions {tuple(part.shape)} do not fit tokens that need {shape}")
    return part.float().expand(shape).contiguous()


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 on the CPU, got {tensor.dtype}")
