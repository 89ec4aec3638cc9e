"""Action heads: from what the decoder makes of a sequence to a normalised action chunk.

A head knows what it needs: the noise it starts from, which hidden states or keys and values it reads, what it
asks of its networks (so that these can be calibrated), and which of its linears must stay precise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from sqap.models.config import (
    DecoderConfig,
    DiffusionHeadConfig,
    FlowHeadConfig,
    HeadConfig,
    TokenHeadConfig,
)
from sqap.models.decoder import Decoder
from sqap.models.heads.diffusion import DiffusionHead
from sqap.models.heads.flow import FlowHead
from sqap.models.heads.regression import RegressionHead
from sqap.models.heads.tokens import TokenHead
from sqap.models.layout import Layout
from sqap.models.stream import Reader, Stream


class HeadProtocol(Protocol):
    """The interface of action heads to the model, its pruner and its quantizer."""

    keeps: bool
    """Whether it reads the decoder's keys and values."""

    chain: ClassVar[str | None]
    """Name of a list of blocks, each of which reads what the one before it returns, if there is one."""

    sensitive: ClassVar[tuple[str, ...]]
    """Paths of its linears that read or write actions, which a recipe treats on their own."""

    def tail(self, layout: Layout) -> int:
        """How many of the last tokens' final hidden states it reads to act."""

    def reader(self, noise: Tensor | None, layout: Layout) -> Reader | None:
        """Tokens of its own that read the decoder's keys, if it has any."""

    def state(self, decoder: Decoder, stream: Stream, layout: Layout, noise: Tensor | None) -> Any:
        """What it reads of a stream behind the last layer, with the noise it starts from."""

    def act(self, decoder: Decoder, state: Any) -> Tensor:
        """Normalised actions ``(batch, horizon, action_dim)``."""

    def questions(self, states: Sequence[Any]) -> list[Any]:
        """What its networks are given on the way to actions: calibration states of the head."""

    def answer(self, question: Any) -> Any:
        """Run its networks on one of `questions`."""


Head = DiffusionHead | FlowHead | RegressionHead | TokenHead


def make_head(config: HeadConfig, decoder: DecoderConfig) -> Head:
    """The head that ``config`` describes, behind a decoder of these sizes."""
    if isinstance(config, FlowHeadConfig):
        return FlowHead(config, decoder)
    if isinstance(config, DiffusionHeadConfig):
        return DiffusionHead(config, decoder.width)
    if isinstance(config, TokenHeadConfig):
        return TokenHead(config, decoder.width)
    return RegressionHead(config, decoder.width)


__all__ = ["DiffusionHead", "FlowHead", "Head", "HeadProtocol", "RegressionHead", "TokenHead", "make_head"]
