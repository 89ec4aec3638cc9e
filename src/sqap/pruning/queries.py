"""The queries whose attention ranks visual tokens: rows of the sequence, or the action expert's tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor

from sqap.models import ModelInputs
from sqap.models.decoder import DecoderLayer, keys
from sqap.models.heads.flow import FlowHead
from sqap.models.layout import Layout
from sqap.models.storage import Weights
from sqap.models.stream import Stream
from sqap.models.through import loaded, streamed
from sqap.models.vla import VLA
from sqap.pruning.attention import AttentionWatcher, query_rows, score_queries
from sqap.recipe import Pruning


class TextAttention:
    """Attention from rows of the sequence.

    Args:
        rows: ``(rows,)`` positions in the stream's first block.
        layers: whose attention is wanted.
        visual: positions of the visual tokens.
    """

    def __init__(self, rows: Tensor, layers: Collection[int], visual: slice) -> None:
        self.watcher: AttentionWatcher | None = AttentionWatcher(layers, rows, visual)
        self._rows = rows

    @property
    def received(self) -> list[Tensor]:
        """Attention ``(1, visual)`` that visual tokens got so far, layer by layer."""
        return cast(AttentionWatcher, self.watcher).received

    def look_ahead(self, i: int, layer: DecoderLayer, stream: Stream) -> Tensor:
        """Attention ``(1, tokens)`` that tokens would get in layer ``i``, were ``stream`` its input."""
        return layer.look(stream.blocks[0], stream.ropes[0], self._rows)

    def follow(self, i: int, stream: Stream) -> None:
        """Note the attention in layer ``i``, behind which ``stream`` is; here `watcher` has done so."""


class ActionAttention:
    """Attention from the action tokens in the first denoising step; its methods are `TextAttention`'s."""

    watcher: AttentionWatcher | None = None

    def __init__(
        self, head: FlowHead, inputs: ModelInputs, layout: Layout, layers: Collection[int], visual: slice
    ) -> None:
        self.received: list[Tensor] = []
        self._head, self._layers, self._visual = head, layers, visual
        self._step = head.first_step(inputs, layout)

    def look_ahead(self, i: int, layer: DecoderLayer, stream: Stream) -> Tensor:
        return self._step.received(i, self._head.experts[i], keys(layer, stream))

    def follow(self, i: int, stream: Stream) -> None:
        expert, prefix = self._head.experts[i], self._head.prefix(stream)[i]
        if i in self._layers:
            self.received.append(self._step.received(i, expert, prefix[0])[:, self._visual])
        self._step = self._step.advance(expert, prefix)


def look_and_attend(
    model: VLA,
    inputs: Sequence[ModelInputs],
    settings: Pruning,
    weights: Weights | None,
    layers: Collection[int],
    done: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`sqap.pruning.lookahead.later_attention` to the visual tokens, ``(layers, frames, visual)`` each."""
    queries, visual = score_queries(settings, model.config), model.config.visual
    actions = queries == "actions"
    looked: list[Tensor] = []
    behind: list[tuple[TextAttention | ActionAttention, Stream]] = []

    def through(name: str, stage: Any, states: Sequence[Stream], call: Callable[..., Any]) -> list[Stream]:
        i = int(name.rpartition(".")[2])
        if i == settings.last_layer:
            behind[:] = [(copy(source), stream) for source, stream in zip(sources, states, strict=True)]
        with loaded(name, stage, weights, model.dtype):
            if i in layers:
                looked.extend(source.look_ahead(i, stage, stream)[:, visual] for source, stream in behind)
            after = [call(stage, stream) for stream in states]
        for source, stream in zip(sources, after, strict=True):
            source.follow(i, stream)
        if done is not None:
            done()
        return after

    with loaded("head", model.head, weights, model.dtype) if actions else nullcontext():
        sources: list[TextAttention | ActionAttention] = []
        for given in inputs:
            layout = model.layout(given)
            if actions:
                head = cast(FlowHead, model.head)
                sources.append(ActionAttention(head, given, layout, layers, visual))
            else:
                rows = query_rows(queries, visual, layout.blocks[0].stop)
                sources.append(TextAttention(rows, layers, visual))
        watchers = [source.watcher for source in sources]
        streams = model.streams(inputs, streamed(weights, model.dtype, done), watchers, keep=actions)
        model.decoder.run(streams, through, max(layers) + 1)
    attended = torch.stack([torch.cat(source.received) for source in sources], dim=1)
    return torch.stack(looked).view_as(attended), attended
