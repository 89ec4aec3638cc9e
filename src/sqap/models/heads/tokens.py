"""OpenVLA's head: the language model's own output matrix, one action dimension after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sqap.models.config import TokenHeadConfig
from sqap.models.decoder import Decoder
from sqap.models.inputs import ModelInputs
from sqap.models.kv import KVCache
from sqap.models.layout import Layout
from sqap.models.stream import ExpertQueries, Stream, TokenPruner
from sqap.models.through import Through


@dataclass(frozen=True)
class Prompt:
    """What the decoder has made of image and prompt.

    Args:
        text: final hidden states ``(batch, tokens, width)`` behind the image.
        stored: keys and values of every layer.
        length: tokens, those included that were pruned.
    """

    text: Tensor
    stored: tuple[tuple[Tensor, ...], ...]
    length: int


class TokenHead(nn.Module):
    """Greedy decoding of action tokens (Kim et al. 2024, section 3.2).

    The image and the prompt are read once; what a pruner drops then is missing from the cache that the action
    tokens look back at.
    """

    reads_keys_values = True
    chain: ClassVar[str | None] = None
    sensitive: ClassVar[tuple[str, ...]] = ("lm_head",)

    def __init__(self, config: TokenHeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(width, config.vocabulary, bias=False)

    def last_tokens(self, layout: Layout) -> int:
        """The last, which decides about the first action token."""
        return 1

    def expert_queries(self, inputs: ModelInputs, layout: Layout) -> ExpertQueries | None:
        return None

    def inputs(self, decoder: Decoder, stream: Stream, layout: Layout, inputs: ModelInputs) -> Prompt:
        text = decoder.finish(stream)[:, layout.from_end("text").start :]
        return Prompt(text, stream.stored or (), layout.decoder.length)

    def act(self, decoder: Decoder, inputs: Prompt) -> Tensor:
        """Actions ``(batch, 1, action_dim)``."""
        return self.actions(self.generate(decoder, inputs))[:, None]

    def calibrate(self, inputs: Sequence[Prompt], through: Through) -> None:
        through("head", self, [prompt.text for prompt in inputs], lambda head, text: head.lm_head(text))

    def read(self, decoder: Decoder, sequence: Tensor, pruner: TokenPruner | None = None) -> Prompt:
        """A sequence ``(batch, tokens, width)`` alone, all of which but what is pruned counts as text."""
        (stream,) = decoder.run([decoder.start(sequence, pruner=pruner, keep=True)])
        return Prompt(decoder.finish(stream), stream.stored or (), sequence.shape[1])

    def generate(self, decoder: Decoder, prompt: Prompt) -> Tensor:
        """The most likely token ids ``(batch, action_dim)``; -1 where what is asked of them is not finite."""
        cache = KVCache(len(decoder.layers), room=self.config.action_dim)
        cache.next_position = prompt.length
        for i, stored in enumerate(prompt.stored):
            cache.extend(i, stored)
        ids = [self._choose(prompt.text[:, -1:])]
        while len(ids) < self.config.action_dim:
            hidden = decoder(decoder.embed(ids[-1].clamp_min(0)), cache=cache)
            ids.append(self._choose(hidden))
        return torch.cat(ids, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """``(batch, tokens, width)`` to ``(batch, tokens, vocabulary)``, in the output matrix's own type."""
        weight = self.lm_head.weight
        out: Tensor = self.lm_head(hidden.to(weight.dtype) if weight.is_floating_point() else hidden)
        return out

    def actions(self, ids: Tensor) -> Tensor:
        """Token ids ``(...)`` to the centres of their bins, and -1 to NaN; others count as the nearest."""
        edges = torch.linspace(-1, 1, self.config.bins, dtype=torch.float64, device=ids.device)
        centres = ((edges[1:] + edges[:-1]) / 2).float()
        found = centres[(self.config.last_token - ids - 1).clamp(0, self.config.bins - 2)]
        return found.masked_fill(ids < 0, torch.nan)

    def _choose(self, hidden: Tensor) -> Tensor:
        logits = self.logits(hidden)
        # The largest of logits that are not numbers would be a token like any other.
        return logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), -1)
