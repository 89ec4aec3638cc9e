"""Scores of visual tokens: the attention they receive in the forward pass that runs anyway."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from sqap.errors import InputError
from sqap.models.config import ModelConfig
from sqap.models.stream import LayerOutput
from sqap.recipe import Pruning, ScoreQueries


def score_layers(settings: Pruning) -> tuple[int, ...]:
    """The decoder layers, counted from 0, whose attention scores the tokens; none for most methods.

    The last layer before a cut, or those that the settings name for the first cut.
    """
    if settings.method not in ("sqap", "attention"):
        return ()
    first, *later = (cut.after_layer - 1 for cut in settings.cuts)
    return *(settings.score_layers or (first,)), *later


def score_queries(settings: Pruning, config: ModelConfig) -> ScoreQueries:
    """Whose attention counts, on a policy of this configuration.

    Raises:
        InputError: the settings name the action expert's tokens, and there is no expert.
    """
    if settings.score_queries == "actions" and not config.head.has_expert:
        raise InputError(
            "score_queries 'actions' needs an action expert, which reads every layer's keys (a flow head); "
            "this policy's head does not: use 'text' or 'last'"
        )
    if settings.score_queries is None:
        return "actions" if config.head.has_expert and settings.method == "lookahead" else "text"
    return settings.score_queries


def query_rows(
    queries: ScoreQueries, visual: slice, length: int, device: torch.device | None = None
) -> Tensor:
    """Positions ``(rows,)`` of the last token or of all text, in ``length`` of which some are ``visual``."""
    first = length - 1 if queries == "last" else visual.stop
    return torch.arange(first, length, dtype=torch.int64, device=device or "cpu")


def per_camera(received: Tensor, cameras: int) -> Tensor:
    """Attention ``(..., visual)`` to scores ``(-1, N)`` of one camera each.

    Each row sums to one, because cameras do not compete: each has a budget of its own.
    """
    return F.normalize(received.reshape(-1, received.shape[-1] // cameras), p=1.0, dim=-1)


class AttentionWatcher:
    """A `TokenPruner` that prunes nothing and records the attention that visual tokens receive.

    Args:
        layers: decoder layers to watch, counted from 0.
        rows: ``(rows,)`` query positions whose attention is averaged.
        visual: positions of the visual tokens.
        cameras: images they are of, equally many each.

    Attributes:
        received: ``(batch, visual)`` of each watched layer so far.
    """

    def __init__(self, layers: Collection[int], rows: Tensor, visual: slice, cameras: int = 1) -> None:
        self._layers, self._rows, self._visual, self._cameras = layers, rows, visual, cameras
        self.received: list[Tensor] = []

    def score_rows(self, layer: int) -> Tensor | None:
        return self._rows if layer in self._layers else None

    def keep(self, layer: int, output: LayerOutput) -> None:
        if output.received is not None and layer in self._layers:
            self.add(output.received)

    def add(self, received: Tensor) -> None:
        """Record the attention ``(batch, tokens)`` received in a layer."""
        self.received.append(received[:, self._visual].cpu())

    @property
    def scores(self) -> Tensor | None:
        """``(batch * cameras, N / cameras)``, averaged over the layers; None before the first layer."""
        return per_camera(torch.stack(self.received).mean(0), self._cameras) if self.received else None
