"""The interface of what multiplies packed weights: on one kind of device, in whole layers where it can.

`sqap.kernels.BACKENDS` is the ordered list. A new backend is a folder beside this file and an entry in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Function = Literal["none", "silu", "gelu", "gelu_tanh"]  # in the native code's order
FUNCTIONS: tuple[str, ...] = get_args(Function)
# Of queries (batch, heads, tokens, head_dim), keys and values (batch, kv_heads, keys, head_dim), whether
# attention is causal, and a mask (tokens, keys) or None.
Attention = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], Tensor]


@dataclass(frozen=True)
class Grids:
    """How a linear's weights and activations are quantized.

    Args:
        weight_bits: 4 or 8.
        activation_bits: 4 or 8.
        symmetric: whether activations have no zero point.
        group_size: channels of an activation that share a scale; all of them for one per token, 0 for one
            for the whole tensor.
        hadamard_block: the size of the Hadamard matrices that rotate an activation before it is quantized, a
            power of two that divides ``in``; 1 for none.
    """

    weight_bits: int
    activation_bits: int
    symmetric: bool
    group_size: int
    hadamard_block: int = 1


@dataclass(frozen=True)
class Packed:
    """A linear as `sqap.quantization.QuantizedLinear` stores it.

    Args:
        weight: uint8 ``(out, in / 2)`` for 4 bits (`sqap.kernels.packing`), int8 ``(out, in)`` for 8.
        scale: float32 ``(out, groups)`` or ``(1, 1)``.
        bias: ``(out,)`` or None.
        grids: what the integers mean.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    grids: Grids


class Linear(Protocol):
    """A packed linear that is bound to a backend."""

    def __call__(self, x: Tensor, function: Function = "none", times: Tensor | None = None) -> Tensor:
        """``function(x) * times`` ``(..., in)`` to ``(..., out)`` in the type of ``x``, any floating one."""


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm; its weight and bias are ``(width,)`` or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """A pre-norm layer: ``x + out(attention(inputs(norm1(x))))``, and then the same with an MLP.

    Args:
        inputs: of queries, keys and values, or one linear for all three; all bound to one backend.
        out: the output projection.
        up: the MLP's first linear, or its gate's and the one that the gate multiplies.
        down: the MLP's second linear.
        norms: before attention, and before the MLP.
        gains: ``(width,)`` of the two branches, or None.
        function: between the MLP's linears.
        heads: query heads, key and value heads, and the width of each.
        causal: whether no token sees those after it.
        cross: whether tokens attend to a prefix alone (`FusedLayer.prefix`). `inputs` is then one linear, of
            queries.
    """

    inputs: Sequence[Linear]
    out: Linear
    up: Sequence[Linear]
    down: Linear
    norms: tuple[Norm, Norm]
    gains: tuple[Tensor | None, Tensor | None]
    function: Function
    heads: tuple[int, int, int]
    causal: bool
    cross: bool = False

    @property
    def parameters(self) -> list[Tensor]:
        """The norms' weights and biases, and the gains."""
        every = (self.norms[0].weight, self.norms[0].bias, self.norms[1].weight, self.norms[1].bias)
        return [parameter for parameter in (*every, *self.gains) if parameter is not None]


class FusedLayer(Protocol):
    """A whole transformer layer that is bound to a backend."""

    def takes(self, x: Tensor, first: int = 0, past: int = 0) -> bool:
        """Whether it can run on ``x`` ``(batch, tokens, width)`` with ``first``, behind ``past`` tokens."""

    def prefix(self, keys: Tensor, values: Tensor, room: int) -> object | None:
        """A prefix that the tokens of many calls attend to, in a form of the backend's own, made once.

        Args:
            keys: ``(batch, kv_heads, length, head_dim)``, rotated.
            values: of the same shape.
            room: how many tokens a call may have at most. Their keys and values are put behind the prefix.

        Returns:
            What `__call__` takes as ``prefix``, of this layer or of one with equal heads; None where such a
            layer has to run module by module.
        """

    def __call__(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        rows: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
        first: int = 0,
        prefix: object | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` ``(batch, tokens, width)`` to the same, and what ``rows`` attend to ``(batch, keys)``.

        Args:
            x: hidden states.
            rope: cosines and sines of the rotary positions, ``(batch, tokens, head_dim)``, or ``(1, tokens,
                head_dim)`` where they are the same for the whole batch.
            rows: ``(rows,)`` indices of the tokens whose attention is wanted, averaged over heads and rows.
            kept: keys and values ``(batch, kv_heads, past + tokens, head_dim)``. The first ``past`` are those
                of earlier tokens, which every token attends to; the tokens' own are written behind them.
            first: tokens before it give keys and values alone, and are missing in what is returned.
            prefix: every token attends to all of it, and to the call's tokens as ever, unless the layer is
                ``cross``. Without ``rows``, ``kept`` and ``first``.
        """


class Backend(Protocol):
    """What multiplies on one kind of device."""

    @property
    def name(self) -> str:
        """For reports. A linear is bound anew when it changes."""

    def fits(self, device: torch.device, grids: Grids) -> bool:
        """Whether it multiplies weights of such grids on that device."""

    def linear(self, packed: Packed) -> Linear:
        """A linear that `fits`; the weight may be repacked.

        Raises:
            ValueError: the tensors do not fit together.
        """

    def layer(self, spec: LayerSpec) -> FusedLayer | None:
        """A layer whose linears are its own; None where it has to run module by module."""

    def look(
        self, layers: Sequence[FusedLayer], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor
    ) -> Tensor | None:
        """What ``rows`` would attend to in later layers, were ``x`` ``(batch, tokens, width)`` their input.

        Returns:
            ``(batch, tokens)`` averaged over layers, heads and rows; None where it cannot.
        """

    def attention(self, device: torch.device, dtype: torch.dtype) -> Attention | None:
        """Softmax attention on that device in that type; None leaves it to PyTorch."""
