"""OpenVLA-OFT's head: all actions of a chunk read off the decoder in one parallel pass."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sqap.models.config import RegressionHeadConfig
from sqap.models.decoder import Decoder, TokenPruner


class ResidualBlock(nn.Module):
    """Norm, linear and ReLU on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.fc(self.norm(x)))


class RegressionHead(nn.Module):
    """The L1-regression head on empty action tokens (Kim, Finn & Liang 2025).

    The decoder's sequence has room for one token per action dimension before its stop token. A position
    speaks for the token behind it, as in the language model this was tuned from.
    """

    def __init__(self, config: RegressionHeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.placeholders = config.horizon * config.action_dim
        inputs = config.action_dim * width
        self.norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.depth))
        self.norm2 = nn.LayerNorm(config.width)
        self.fc2 = nn.Linear(config.width, config.action_dim)

    def forward(
        self, decoder: Decoder, sequence: Tensor, noise: Tensor | None, pruner: TokenPruner | None
    ) -> Tensor:
        """``(batch, tokens, width)`` to actions ``(batch, horizon, action_dim)``, without noise."""
        return self.regress(self.gather(decoder(sequence, pruner=pruner)))

    def gather(self, hidden: Tensor) -> Tensor:
        """Final hidden states to what the MLP reads in its type, ``(batch, horizon, action_dim * width)``."""
        actions = hidden[:, -(self.placeholders + 2) : -2].reshape(len(hidden), self.config.horizon, -1)
        return actions.to(self.norm1.weight.dtype)

    def regress(self, x: Tensor) -> Tensor:
        """The MLP: ``(batch, horizon, action_dim * width)`` to actions."""
        x = F.relu(self.fc1(self.norm1(x)))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.fc2(self.norm2(x))
        return out
