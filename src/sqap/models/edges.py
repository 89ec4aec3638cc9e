"""Edges: the linears between activations that a change of basis rewrites.

A module lists its own in ``edges``. Rotation goes by them (`sqap.quantization.rotation`), and so does what
needs to know where a rotated activation comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

# The residual stream; attention's values; these mixed, for each query head; the MLP's inner activations.
Basis = Literal["residual", "values", "mixed", "inner"]


@dataclass(frozen=True)
class Edge:
    """A linear between two activations.

    Args:
        linear: its path in the module that lists it.
        reads: the activation it reads, if a rotation may change that.
        writes: the activation it writes, likewise.
        norm: path of the norm before it, whose gain can go into its weight.
    """

    linear: str
    reads: Basis | None = None
    writes: Basis | None = None
    norm: str | None = None


def edges_of(model: nn.Module) -> dict[str, Edge]:
    """The edges in a model by their linears' paths."""
    return {
        f"{path}.{edge.linear}" if path else edge.linear: edge
        for path, module in model.named_modules()
        for edge in getattr(module, "edges", ())
    }
