"""The reference backend: PyTorch's arithmetic on any device. The other backends are checked against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sqap.kernels.backend import Function, FusedLayer, Grids, LayerSpec, Packed
from sqap.kernels.hadamard import block_hadamard
from sqap.kernels.levels import (
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    row_chunks,
    rows_of,
)
from sqap.kernels.packing import unpack_int4

ACTIVATIONS: dict[Function, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
BLOCK = 1 << 20  # bytes of a packed weight that are unpacked at a time: what fits in a cache


class ReferenceBackend:
    """The `sqap.kernels.backend.Backend` of every device: linears alone, no layers."""

    name = "reference"

    def fits(self, device: torch.device, grids: Grids) -> bool:
        return True

    def linear(self, packed: Packed) -> ReferenceLinear:
        return ReferenceLinear(packed)

    def layer(self, spec: LayerSpec) -> None:
        return None

    def look(
        self, layers: Sequence[FusedLayer], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor
    ) -> None:
        return None

    def attention(self, device: torch.device, dtype: torch.dtype) -> None:
        return None


@dataclass(frozen=True)
class ReferenceLinear:
    """Exact integer products where scales are per channel, token or tensor; float32 products where per group.

    Args:
        packed: on one device.
    """

    packed: Packed

    def __call__(self, x: Tensor, function: Function = "none", times: Tensor | None = None) -> Tensor:
        """As `sqap.kernels.backend.Linear.__call__`; only the result is rounded to the type of ``x``."""
        grids, weight = self.packed.grids, self.packed.weight
        wide = ACTIVATIONS[function](x.float())
        if times is not None:
            wide = wide * times
        if grids.hadamard_block > 1:
            wide = block_hadamard(wide, grids.hadamard_block)
        q, scale, zero_point = quantize_activation(
            wide,
            grids.activation_bits,
            "token" if grids.group_size else "tensor",
            grids.symmetric,
            grids.group_size if 0 < grids.group_size < x.shape[-1] else None,
        )
        out = wide.new_empty(*x.shape[:-1], len(weight))
        for rows in row_chunks(weight, BLOCK):
            out[..., rows] = self._multiply(q, scale, zero_point, rows)
        bias = self.packed.bias
        return (out if bias is None else out + bias).to(x.dtype)

    def _multiply(self, q: Tensor, scale: Tensor, zero_point: Tensor | None, rows: slice) -> Tensor:
        """Some of the outputs, without bias: ``(..., rows)``, float32."""
        grids, weight = self.packed.grids, self.packed.weight[rows]
        levels = unpack_int4(weight) if grids.weight_bits == 4 else weight
        weight_scale = rows_of(self.packed.scale, rows)
        if weight_scale.shape[1] > 1 or scale.shape[-1] > 1:
            return F.linear(
                dequantize_activation(q, scale, zero_point), dequantize_weight(levels, weight_scale)
            )
        sums = integer_matmul(q, levels, 1 << grids.activation_bits + grids.weight_bits - 2)
        if zero_point is not None:
            sums -= zero_point * levels.sum(1, dtype=torch.int32)
        return sums.float().mul_(scale).mul_(weight_scale.T)


def integer_matmul(q: Tensor, weight: Tensor, largest: int) -> Tensor:
    """int8 ``(..., in)`` times int8 ``(out, in)``: exact int32 ``(..., out)``, on any device.

    ``largest`` is a bound on the magnitude of a single product; int32 holds 131071 of the largest there are.
    float32 counts exactly up to 2**24, so the inputs are cut into as many slices as that takes.
    """
    step = 2**24 // largest
    sums = F.linear(q[..., :step].float(), weight[:, :step].float()).to(torch.int32)
    for start in range(step, q.shape[-1], step):
        inputs = slice(start, start + step)
        sums += F.linear(q[..., inputs].float(), weight[:, inputs].float()).to(torch.int32)
    return sums
