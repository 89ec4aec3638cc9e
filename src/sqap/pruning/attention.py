"""Reading the scores: how much attention visual tokens receive, out of the pass that runs anyway."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from sqap.recipe import Pruning, ScoreQueries


def score_layers(settings: Pruning) -> tuple[int, ...]:
    """The decoder layers, counted from 0, whose attention ranks the tokens; none for the baselines."""
    if settings.method not in ("sqap", "attention"):
        return ()
    return settings.score_layers or (settings.after_layer - 1,)


def query_rows(queries: ScoreQueries, visual: slice, length: int) -> Tensor:
    """Positions ``(rows,)`` whose attention counts, in ``length`` of which those in ``visual`` are visual."""
    first = visual.stop if queries == "text" else length - 1
    return torch.arange(first, length, dtype=torch.int64, device="cpu")


class AttentionWatcher:
    """A `TokenPruner` that prunes nothing and remembers what the visual tokens receive.

    Args:
        layers: decoder layers to watch, counted from 0.
        rows: ``(rows,)`` query positions whose attention is averaged.
        visual: positions of the visual tokens.
        cameras: images they are of, equally many each.
    """

    def __init__(self, layers: Collection[int], rows: Tensor, visual: slice, cameras: int = 1) -> None:
        self._layers, self._rows, self._visual, self._cameras = layers, rows, visual, cameras
        self._received: list[Tensor] = []

    def score_rows(self, layer: int) -> Tensor | None:
        return self._rows if layer in self._layers else None

    def keep(self, layer: int, received: Tensor) -> None:
        if layer in self._layers:
            # A few numbers, chosen from on the CPU wherever the model runs.
            self._received.append(received[:, self._visual].cpu())

    @property
    def scores(self) -> Tensor | None:
        """``(batch * cameras, N / cameras)``, averaged over the layers; None before the first layer.

        Each row sums to one, because cameras do not compete: each has a budget of its own.
        """
        if not self._received:
            return None
        received = torch.stack(self._received).mean(0)
        return F.normalize(received.view(-1, received.shape[-1] // self._cameras), p=1.0, dim=-1)
