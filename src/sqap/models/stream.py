"""Tokens on their way through the decoder's layers, and the interface of what prunes them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sqap.models.kv import KVCache


@dataclass(frozen=True)
class LayerOutput:
    """What a pruner is given behind a layer.

    Args:
        hidden: ``(batch, tokens, width)``, the layer's output.
        embedded: the first layer's input, of all tokens, dropped ones included.
        received: ``(batch, tokens)``, the attention that each token gets in this layer, averaged over heads
            and over the rows of `TokenPruner.score_rows`; None without such rows.
        look_ahead: ``look_ahead(layers, rows)`` is the attention ``(batch, tokens)`` that tokens would get
            from ``rows`` in later layers, were ``hidden`` their input, averaged over layers, heads and rows.
            None for ``rows`` means the action expert's tokens, where there is an expert.
    """

    hidden: Tensor
    embedded: Tensor
    received: Tensor | None
    look_ahead: Callable[[Sequence[int], Tensor | None], Tensor]


class TokenPruner(Protocol):
    """Decides between layers which tokens of the sequence go on; its tensors may live on any device."""

    def score_rows(self, layer: int) -> Tensor | None:
        """Places ``(rows,)`` in the sequence whose attention in this layer is wanted, or None."""

    def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
        """Places ``(batch, kept)`` in the sequence, ascending, that go on after this layer; None for all."""


class ExpertQueries(Protocol):
    """The queries of an action expert's tokens, which attend to the decoder's keys."""

    def received(self, stream: Stream, keys: Mapping[int, Tensor]) -> list[Tensor]:
        """Attention ``(batch, tokens)`` that the first block would get, for each layer of ``keys``.

        Args:
            stream: behind a layer, with the keys and values so far.
            keys: of later layers, as `keys` gives them.
        """


@dataclass(frozen=True)
class Stream:
    """The tokens of one observation, or of a batch, behind some of the decoder's layers.

    Args:
        blocks: hidden states ``(batch, tokens, width)`` of each block of the layout.
        ropes: their rotary positions.
        embedded: the first block as it was before the first layer.
        pruner: shortens the first block.
        stored: keys and values of all blocks, layer by layer so far; None if nothing reads them.
        cache: holds earlier tokens; None if there are none.
        queries: of the action expert, whose attention a pruner may go by.
        last_tokens: how many of the first block's last tokens the last layer computes; all if None. Of the
            other blocks it then computes keys and values alone.
    """

    blocks: tuple[Tensor, ...]
    ropes: tuple[tuple[Tensor, Tensor], ...]
    embedded: Tensor
    pruner: TokenPruner | None = None
    stored: tuple[tuple[Tensor, ...], ...] | None = None
    cache: KVCache | None = None
    queries: ExpertQueries | None = None
    last_tokens: int | None = None
