"""OpenVLA's head: the language model's own output matrix, one action dimension after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqap.models.config import TokenHeadConfig
from sqap.models.decoder import Decoder, KVCache, TokenPruner


class TokenHead(nn.Module):
    """Greedy decoding of action tokens (Kim et al. 2024, section 3.2).

    The image and the prompt are read once; what a pruner drops then is missing from the cache that the action
    tokens look back at.
    """

    placeholders = 0

    def __init__(self, config: TokenHeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(width, config.vocabulary, bias=False)

    def forward(
        self, decoder: Decoder, sequence: Tensor, noise: Tensor | None, pruner: TokenPruner | None
    ) -> Tensor:
        """``(batch, tokens, width)`` to actions ``(batch, 1, action_dim)``, without noise."""
        return self.actions(self.generate(decoder, sequence, pruner))[:, None]

    def generate(self, decoder: Decoder, sequence: Tensor, pruner: TokenPruner | None = None) -> Tensor:
        """The most likely token ids ``(batch, action_dim)``; -1 where what is asked of them is not finite."""
        cache = KVCache(len(decoder.layers))
        hidden = decoder(sequence, cache=cache, pruner=pruner)
        ids = [self._choose(hidden[:, -1:])]
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
