"""OpenVLA-OFT's head: all actions of a chunk read off the decoder in one parallel pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sqap.models.config import RegressionHeadConfig
from sqap.models.decoder import Decoder
from sqap.models.inputs import ModelInputs
from sqap.models.layout import Layout
from sqap.models.stream import ExpertQueries, Stream
from sqap.models.through import Through


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

    reads_keys_values = False
    chain: ClassVar[str | None] = None
    sensitive: ClassVar[tuple[str, ...]] = ("fc2",)

    def __init__(self, config: RegressionHeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        inputs = config.action_dim * width
        self.norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.depth))
        self.norm2 = nn.LayerNorm(config.width)
        self.fc2 = nn.Linear(config.width, config.action_dim)

    def last_tokens(self, layout: Layout) -> int:
        """Those before the actions, and what follows."""
        start: int = layout.span("actions").start
        return 1 + layout.decoder.length - start

    def expert_queries(self, inputs: ModelInputs, layout: Layout) -> ExpertQueries | None:
        return None

    def inputs(self, decoder: Decoder, stream: Stream, layout: Layout, inputs: ModelInputs) -> Tensor:
        """What the MLP reads, in its type: ``(batch, horizon, action_dim * width)``."""
        return self.gather(decoder.finish(stream), layout)

    def gather(self, hidden: Tensor, layout: Layout) -> Tensor:
        """`inputs`, of final hidden states ``(batch, tokens, width)``."""
        place = layout.from_end("actions")
        actions = hidden[:, place.start - 1 : place.stop - 1]
        return actions.reshape(len(hidden), self.config.horizon, -1).to(self.norm1.weight.dtype)

    def act(self, decoder: Decoder, inputs: Tensor) -> Tensor:
        return self.regress(inputs)

    def calibrate(self, inputs: Sequence[Tensor], through: Through) -> None:
        through("head", self, inputs, lambda head, x: head.regress(x))

    def regress(self, x: Tensor) -> Tensor:
        """The MLP: ``(batch, horizon, action_dim * width)`` to actions."""
        x = F.relu(self.fc1(self.norm1(x)))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.fc2(self.norm2(x))
        return out
