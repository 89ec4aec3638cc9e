"""The CPU backend: the native extension's linears and layers, and attention in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sqap.kernels import cpu
from sqap.kernels.backend import Attention, FusedLayer, Grids, LayerSpec, Packed
from sqap.kernels.cpu.layer import LANES, CpuLayer, look


class CpuBackend:
    """The `sqap.kernels.backend.Backend` of CPUs, unless SQAP_KERNELS names PyTorch's arithmetic."""

    @property
    def name(self) -> str:
        """The path in use."""
        return cpu.chosen()

    def fits(self, device: torch.device, grids: Grids) -> bool:
        return device.type == "cpu" and self.name != cpu.REFERENCE

    def linear(self, packed: Packed) -> cpu.CpuLinear:
        return cpu.CpuLinear(packed)

    def layer(self, spec: LayerSpec) -> CpuLayer | None:
        """None where parameters are not float32, or heads are not a multiple of `LANES` wide."""
        if spec.heads[2] % LANES or any(p.dtype != torch.float32 for p in spec.parameters):
            return None
        return CpuLayer(spec)

    def look(
        self, layers: Sequence[FusedLayer], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor
    ) -> Tensor | None:
        """None for a batch, and for another type than float32."""
        if len(x) != 1 or not all(layer.takes(x) for layer in layers):
            return None
        return look(cast(Sequence[CpuLayer], layers), x, rope, rows)

    def attention(self, device: torch.device, dtype: torch.dtype) -> Attention | None:
        """In bfloat16, on every path."""
        return attend_bfloat16 if dtype == torch.bfloat16 and device.type == "cpu" else None


def attend_bfloat16(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """`sqap.kernels.backend.Attention` as two plain products.

    In this one case torch's fused kernel reaches a third of their speed.
    """
    batch, heads, tokens, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    folded = (q * width**-0.5).reshape(batch * kv_heads, -1, width)
    scores = torch.bmm(folded, k.reshape(-1, keys, width).transpose(1, 2)).view(batch, heads, tokens, keys)
    if causal:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).view(batch * kv_heads, -1, keys)
    return torch.bmm(weights, v.reshape(-1, keys, width)).view(batch, heads, tokens, width)
