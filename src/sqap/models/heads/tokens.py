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
        """The most likely token ids ``(batch, action_dim)``."""
        cache = KVCache(len(decoder.layers))
        hidden = decoder(sequence, cache=cache, pruner=pruner)
        ids = [self.lm_head(hidden[:, -1:]).argmax(-1)]
        while len(ids) < self.config.action_dim:
            hidden = decoder(decoder.embed(ids[-1]), cache=cache)
            ids.append(self.lm_head(hidden).argmax(-1))
        return torch.cat(ids, dim=1)

    def actions(self, ids: Tensor) -> Tensor:
        """Token ids ``(...)`` to the centres of their bins; other ids count as the nearest action's."""
        edges = torch.linspace(-1, 1, self.config.bins, dtype=torch.float64, device=ids.device)
        centres = ((edges[1:] + edges[:-1]) / 2).float()
        return centres[(self.config.last_token - ids - 1).clamp(0, self.config.bins - 2)]
