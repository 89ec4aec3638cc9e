"""How a pruner would rank the visual tokens of given inputs, by a model that need not be in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from sqap.models import VLA, ModelInputs, empty_model
from sqap.models.stages import fill_around, stages, widen_around
from sqap.models.storage import Progress, Weights
from sqap.pruning.attention import score_layers, score_queries
from sqap.pruning.calibration import attention_scores
from sqap.pruning.lookahead import affordable, choose_layers, later_attention, later_layers, recall
from sqap.quantization import share
from sqap.recipe import Pruning


@dataclass(frozen=True)
class Ranking:
    """How a pruner would rank the tokens of the calibration frames.

    Args:
        scores: ``(frames * cameras, tokens of a camera)``.
        layers: that method "lookahead" looks at; None with other methods.
        recall: share of the budget's best tokens, by later layers' attention, that looking ahead finds.
    """

    scores: torch.Tensor
    layers: tuple[int, ...] | None = None
    recall: float | None = None


class Ranker:
    """How pruners of method "sqap", "attention" or "lookahead" would rank tokens by ``model``.

    In float32, whatever the types of ``model``; where there are ``weights``, by them instead of its own.

    Args:
        model: the policy's network.
        inputs: one observation each.
        weights: where the model's are, if they are not in it.
        progress: gets (stages done, stages in all) while the model is run.
    """

    def __init__(
        self,
        model: VLA,
        inputs: Sequence[ModelInputs],
        weights: Weights | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model = share(model) if weights is None else empty_model(model.config)
        self._inputs, self._weights, self._progress = inputs, weights, progress
        self._later: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        widen_around(self._model, [stage for _, stage in stages(self._model)])
        if weights is not None:
            fill_around(self._model, weights)

    def __call__(self, pruning: Pruning, layers: tuple[int, ...] | None = None) -> Ranking:
        """The ranking by ``pruning``. ``layers`` to look ahead at are chosen where they are not given."""
        config = self._model.config
        if pruning.method != "lookahead":
            queries = score_queries(pruning, config)
            layers_read = score_layers(pruning)
            done = self._counter(max(layers_read))
            scores = attention_scores(self._model, self._inputs, layers_read, queries, self._weights, done)
            return Ranking(scores)
        layers = layers or pruning.score_layers
        if layers is not None and self._weights is None:
            return Ranking(self._attention(pruning, layers)[0].mean(0), layers)
        looked, attended = self._attention(pruning)
        k, first = pruning.budget(config.grid**2), pruning.last_layer
        if layers is None:
            found = choose_layers(looked, attended, k, affordable(pruning, config.decoder))
            layers = tuple(first + i for i in found)
        looked = looked[[layer - first for layer in layers]]
        return Ranking(looked.mean(0), layers, recall(looked, attended, k))

    def _attention(
        self, pruning: Pruning, layers: tuple[int, ...] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`later_attention`, which the budget has no part in, once for each place of the last cut."""
        key = pruning.last_layer, score_queries(pruning, self._model.config), layers
        if key not in self._later:
            last = max(layers or later_layers(pruning, self._model.config.decoder))
            self._later[key] = later_attention(
                self._model, self._inputs, pruning, self._weights, layers=layers, done=self._counter(last)
            )
        return self._later[key]

    def _counter(self, last: int) -> Callable[[], None] | None:
        """What is to be called behind each stage of a run as far as decoder layer ``last``."""
        if self._progress is None:
            return None
        names = [name for name, _ in stages(self._model)]
        progress, done, total = self._progress, count(1), names.index(f"decoder.layers.{last}") + 1
        return lambda: progress(next(done), total)
