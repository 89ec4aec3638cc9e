"""What the vision encoders and the action head share: biased attention and a two-layer MLP."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqap import kernels
from sqap.kernels import Function
from sqap.kernels.reference import ACTIVATIONS


class Fused(Protocol):
    """Runs a whole layer in one native call, or says None where it cannot."""

    def __call__(
        self,
        layer: nn.Module,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        rows: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
        first: int = 0,
    ) -> tuple[Tensor, Tensor | None] | None: ...


def activated(linear: nn.Module, function: Function, x: Tensor, times: Tensor | None = None) -> Tensor:
    """``linear`` of ``function(x) * times``; one that ``fuses`` does all of it in one pass over ``x``."""
    if getattr(linear, "fuses", False):
        fused: Tensor = linear(x, function, times)
        return fused
    y = ACTIVATIONS[function](x)
    out: Tensor = linear(y if times is None else y * times)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of ``(batch, heads, tokens, head_dim)`` over ``(batch, kv_heads, keys, head_dim)``.

    Query heads are grouped by key/value head in order. ``mask`` ``(tokens, keys)`` is true where a query
    may look; ``causal`` says that queries and keys are the same tokens and none looks ahead.
    """
    attention = kernels.attention(q.device, q.dtype)
    if attention is not None:
        return attention(q, k, v, causal, mask)
    grouped = bool(q.shape[1] != k.shape[1])  # sizes are tensors while a tool traces the model
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class SelfAttention(nn.Module):
    """Full multi-head attention with one fused, biased projection, as in timm's ViTs and DiT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class MLP(nn.Module):
    """Linear, activation function, linear."""

    def __init__(self, width: int, hidden: int, activation: Function) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.fc2, self.activation, self.fc1(x))


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """``(batch,)`` time steps to ``(batch, width)``: cosines, then sines (Vaswani et al. 2017)."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * max_period**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
