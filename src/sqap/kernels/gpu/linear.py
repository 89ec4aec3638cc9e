"""A packed linear on a GPU: activations are quantized by one program and multiplied by another."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sqap.kernels.backend import FUNCTIONS, Function, Norm, Packed
from sqap.kernels.gpu import programs
from sqap.kernels.gpu.tiles import choose

FLOATS = torch.float32, torch.bfloat16, torch.float16
CHUNK = 1024  # values of a token in a row of the tile that is quantized
ASSEMBLY = os.environ.get("TRITON_INTERPRET") != "1"  # the interpreter knows none


@dataclass(frozen=True)
class Levels:
    """Quantized tokens.

    Args:
        q: int8 ``(tokens, in)``, in the order that the weights they are for need (`programs`).
        scale: float32 ``(tokens,)``.
    """

    q: Tensor
    scale: Tensor

    def rows(self, rows: Tensor | slice) -> Levels:
        """Some of the tokens."""
        return Levels(self.q[rows], self.scale[rows])


class GpuLinear:
    """A `sqap.kernels.backend.Linear` of grids that `backend.check_grids` lets pass.

    Args:
        packed: on one device.
    """

    def __init__(self, packed: Packed) -> None:
        weight, grids = packed.weight, packed.grids
        self.out_features, width = weight.shape
        self.split = grids.weight_bits == 4
        self.in_features = 2 * width if self.split else width
        self.grids, self.weight = grids, weight.contiguous()
        self.scale = packed.scale[:, 0].expand(self.out_features).contiguous()
        self.bias = None if packed.bias is None else packed.bias.contiguous()
        cuda = weight.device.type == "cuda"
        self._major = torch.cuda.get_device_capability(weight.device)[0] if cuda else 8

    def __call__(self, x: Tensor, function: Function = "none", times: Tensor | None = None) -> Tensor:
        self._check(x)
        flat = x.reshape(-1, self.in_features)
        levels = self.quantize(flat, function, None if times is None else times.reshape(flat.shape))
        return self.multiply(levels, x.dtype).view(*x.shape[:-1], self.out_features)

    def quantize(self, x: Tensor, function: Function = "none", times: Tensor | None = None) -> Levels:
        """``function(x) * times`` ``(tokens, in)`` behind the Hadamard matrix."""
        self._check(x)
        m, k = x.shape
        levels, block = empty_levels(x), self.grids.hadamard_block
        width = max(block, 16, min(CHUNK, triton.next_power_of_2(k)))
        x, times = x.contiguous(), None if times is None else times.contiguous()
        if m:
            programs.activation_quantize[(m,)](
                x, x if times is None else times, levels.q, levels.scale,
                K=k, FUNCTION=FUNCTIONS.index(function), FACTOR=times is not None, HADAMARD=block,
                LOG=block.bit_length() - 1, BITS=self.grids.activation_bits, SPLIT=self.split,
                CHUNKS=triton.next_power_of_2(triton.cdiv(k, width)), BLOCK=width, num_warps=warps(k),
            )  # fmt: skip
        return levels

    def normed(self, x: Tensor, norm: Norm) -> Levels:
        """A norm of ``x`` ``(tokens, in)``."""
        self._check(x)
        m, k = x.shape
        levels, x, weight, bias = empty_levels(x), x.contiguous(), norm.weight, norm.bias
        if m:
            programs.norm_quantize[(m,)](
                x, x if weight is None else weight, x if bias is None else bias,
                levels.q, levels.scale, norm.eps,
                K=k, RMS=norm.rms, GAIN=weight is not None, SHIFT=bias is not None,
                BITS=self.grids.activation_bits, SPLIT=self.split, BLOCK=triton.next_power_of_2(k),
                num_warps=warps(k),
            )  # fmt: skip
        return levels

    def multiply(
        self, x: Levels, dtype: torch.dtype, *, gain: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """``residual + gain * (x W^T + bias)`` ``(tokens, out)`` in ``dtype``."""
        m, n = len(x.q), self.out_features
        y = torch.empty(m, n, dtype=dtype, device=x.q.device)
        tile, bias = choose(m, n, self._major), self.bias
        residual = None if residual is None else residual.contiguous()
        if m:
            programs.product[(triton.cdiv(n, tile.outputs), triton.cdiv(m, tile.tokens))](
                x.q, x.scale, self.weight, self.scale, self.scale if bias is None else bias,
                self.scale if gain is None else gain, y if residual is None else residual, y, m, n,
                K=self.in_features, BITS=self.grids.weight_bits, BIAS=bias is not None, GAIN=gain is not None,
                RESIDUAL=residual is not None, ASSEMBLY=ASSEMBLY, BLOCK_M=tile.tokens, BLOCK_N=tile.outputs,
                BLOCK_K=tile.channels, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return y

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features or x.dtype not in FLOATS or x.device != self.weight.device:
            raise ValueError(
                f"inputs {tuple(x.shape)} of {x.dtype} on {x.device} do not fit a weight of "
                f"{self.in_features} channels on {self.weight.device}"
            )


def empty_levels(x: Tensor) -> Levels:
    """Room for the levels of ``x`` ``(tokens, in)``."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return Levels(q, torch.empty(len(x), dtype=torch.float32, device=x.device))


def warps(channels: int) -> int:
    """How many warps quantize a token."""
    bounds = (16384, 32), (8192, 16), (2048, 8)
    return next((count for least, count in bounds if channels > least), 4)
