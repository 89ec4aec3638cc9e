"""Whose attention ranks the visual tokens: rows of the sequence, or the action expert's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from sqap.models.decoder import Decoder, DecoderLayer, KVCache
from sqap.models.heads.flow import FirstStep, FlowHead
from sqap.models.stages import loaded, run_layer, whole_rope
from sqap.models.storage import Weights
from sqap.models.vla import VLA, ModelInputs
from sqap.pruning.attention import query_rows, score_queries
from sqap.recipe import Pruning


@contextmanager
def readers_of(
    model: VLA,
    sequences: Sequence[Tensor],
    inputs: Sequence[ModelInputs],
    settings: Pruning,
    weights: Weights | None,
) -> Iterator[list[TextReader | ActionReader]]:
    """One reader for each of the decoder's ``sequences``; an expert's weights are loaded meanwhile."""
    queries, visual = score_queries(settings, model.config.head), model.config.visual
    prefixes = [model.prefix(x) for x in sequences]
    if queries != "actions":
        rows = [query_rows(queries, visual, x.shape[1]) for x in prefixes]
        yield [TextReader(model.decoder, x, asked) for x, asked in zip(prefixes, rows, strict=True)]
        return
    head = cast(FlowHead, model.head)
    with loaded("head", head, weights, model.dtype):
        yield [
            ActionReader(model.decoder, x, FirstStep(head, cast(Tensor, given.noise), whole.shape[1]))
            for x, whole, given in zip(prefixes, sequences, inputs, strict=True)
        ]


@dataclass
class TextReader:
    """Rows of the sequence itself, ``hidden`` ``(1, tokens, width)``, which layers take further."""

    decoder: Decoder
    hidden: Tensor
    rows: Tensor

    def copy(self) -> TextReader:
        return dataclasses.replace(self)

    def look(self, i: int, layer: DecoderLayer) -> Tensor:
        """Attention ``(1, tokens)`` that would be paid in layer ``i``, were ``hidden`` its input."""
        return layer.look(self.hidden, whole_rope(self.decoder, self.hidden), self.rows)

    def run(self, i: int, layer: DecoderLayer) -> Tensor:
        """Go through layer ``i``; the attention ``(1, tokens)`` that is paid there."""
        self.hidden, received = run_layer(self.decoder, layer, self.hidden, self.rows)
        return cast(Tensor, received)


@dataclass
class ActionReader:
    """The action expert's tokens in their first denoising step, beside the prefix that they read.

    The token of the robot's state comes behind the prefix, after pruning, and is left out.
    """

    decoder: Decoder
    hidden: Tensor
    step: FirstStep

    def copy(self) -> ActionReader:
        return dataclasses.replace(self, step=copy(self.step))

    def look(self, i: int, layer: DecoderLayer) -> Tensor:
        """As `TextReader.look`."""
        return self.step.attention(i, layer.keys(self.hidden, whole_rope(self.decoder, self.hidden)))

    def run(self, i: int, layer: DecoderLayer) -> Tensor:
        """As `TextReader.run`."""
        cache = KVCache(i + 1)
        self.hidden, _ = layer(self.hidden, whole_rope(self.decoder, self.hidden), i, cache)
        stored = self.step.head.stored(cache, i)
        received = self.step.attention(i, stored[0])
        self.step.run(i, stored)
        return received
