"""The projector: visual features into the decoder's residual stream."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sqap.models.edges import Edge
from sqap.models.transformer import activated


class Projector(nn.Module):
    """Linears ``fc1, fc2, ...`` with GELU between them, as in Prismatic's VLMs."""

    def __init__(self, width: int, outputs: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        inputs = (width, *outputs[:-1])
        self.layers = nn.ModuleList(nn.Linear(i, o, bias) for i, o in zip(inputs, outputs, strict=True))
        self.edges = (Edge(f"layers.{len(outputs) - 1}", writes="residual"),)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, vision width)`` to ``(batch, tokens, decoder width)``."""
        for i, layer in enumerate(self.layers):
            x = activated(layer, "gelu" if i else "none", x)
        return x
