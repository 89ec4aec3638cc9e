"""Whose attention ranks the visual tokens: rows of the sequence, or the action expert's tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor

from sqap.models.decoder import DecoderLayer, keys
from sqap.models.heads.flow import FirstStep, FlowHead
from sqap.models.storage import Weights
from sqap.models.stream import Stream
from sqap.models.through import loaded, streamed
from sqap.models.vla import VLA, ModelInputs
from sqap.pruning.attention import AttentionWatcher, query_rows, score_queries
from sqap.recipe import Pruning


class TextReader:
    """Rows of the sequence.

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
        """Attention ``(1, visual)`` paid so far, layer by layer."""
        return cast(AttentionWatcher, self.watcher).received

    def look(self, i: int, layer: DecoderLayer, stream: Stream) -> Tensor:
        """Attention ``(1, tokens)`` that would be paid in layer ``i``, were ``stream`` its input."""
        return layer.look(stream.blocks[0], stream.ropes[0], self._rows)

    def follow(self, i: int, stream: Stream) -> None:
        """Take in what layer ``i`` has made of the stream; here its pruner, `watcher`, has."""


class ActionReader:
    """The expert's action tokens in their first denoising step; `TextReader` says what the methods do."""

    watcher: AttentionWatcher | None = None

    def __init__(self, step: FirstStep, layers: Collection[int], visual: slice) -> None:
        self.received: list[Tensor] = []
        self._step, self._layers, self._visual = step, layers, visual

    def look(self, i: int, layer: DecoderLayer, stream: Stream) -> Tensor:
        return self._step.attention(i, keys(layer, stream))

    def follow(self, i: int, stream: Stream) -> None:
        seen = self._step.head.seen(stream)[i]
        if i in self._layers:
            self.received.append(self._step.attention(i, seen[0])[:, self._visual])
        self._step = copy(self._step)  # whoever looks from an earlier layer keeps that
        self._step.run(i, seen)


def look_and_attend(
    model: VLA,
    inputs: Sequence[ModelInputs],
    settings: Pruning,
    weights: Weights | None,
    layers: Collection[int],
) -> tuple[Tensor, Tensor]:
    """`sqap.pruning.lookahead.later_attention` to the visual tokens, ``(layers, frames, visual)`` each."""
    queries, visual = score_queries(settings, model.config), model.config.visual
    actions = queries == "actions"
    looked: list[Tensor] = []
    behind: list[tuple[TextReader | ActionReader, Stream]] = []

    def through(name: str, stage: Any, states: Sequence[Stream], call: Callable[..., Any]) -> list[Stream]:
        i = int(name.rpartition(".")[2])
        if i == settings.last_layer:
            behind[:] = [(copy(reader), stream) for reader, stream in zip(readers, states, strict=True)]
        with loaded(name, stage, weights, model.dtype):
            if i in layers:
                looked.extend(reader.look(i, stage, stream)[:, visual] for reader, stream in behind)
            after = [call(stage, stream) for stream in states]
        for reader, stream in zip(readers, after, strict=True):
            reader.follow(i, stream)
        return after

    with loaded("head", model.head, weights, model.dtype) if actions else nullcontext():
        readers: list[TextReader | ActionReader] = []
        for given in inputs:
            layout = model.layout(given)
            if actions:
                step = FirstStep(cast(FlowHead, model.head), cast(Tensor, given.noise), layout.decoder.length)
                readers.append(ActionReader(step, layers, visual))
            else:
                rows = query_rows(queries, visual, layout.blocks[0].stop)
                readers.append(TextReader(rows, layers, visual))
        watchers = [reader.watcher for reader in readers]
        streams = model.streams(inputs, streamed(weights, model.dtype), watchers, keeps=actions)
        model.decoder.run(streams, through, max(layers) + 1)
    attended = torch.stack([torch.cat(reader.received) for reader in readers], dim=1)
    return torch.stack(looked).view_as(attended), attended
