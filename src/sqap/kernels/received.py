"""The attention that tokens receive, by which the pruner ranks them: PyTorch operators for any device."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_received(q: Tensor, k: Tensor, rows: Tensor, *, causal: bool = True) -> Tensor:
    """Attention that each key gets from a few query rows: one row block, not a second full attention.

    Args:
        q: ``(batch, heads, rows, head_dim)``, those rows' rotated queries.
        k: ``(batch, kv_heads, keys, head_dim)`` rotated keys.
        rows: ``(rows,)``, which of the keys are the queries' own.
        causal: whether a query sees only the keys up to its own.

    Returns:
        ``(batch, keys)`` probabilities averaged over heads and rows; each batch entry sums to one.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores: Tensor = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        future = torch.arange(k.shape[2], dtype=torch.int64, device=k.device) > rows.to(k.device)[:, None]
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(-1).mean((1, 2))
