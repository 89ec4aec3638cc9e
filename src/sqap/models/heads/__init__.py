"""Action heads: from the decoder's hidden states, or its keys and values, to a normalised action chunk.

A head knows what it needs: the noise it starts from, which hidden states or keys and values it reads, the
inputs of its networks (on which these are calibrated), and which of its linears must stay precise.
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
from sqap.models.heads.fixed_steps import fix_steps
from sqap.models.heads.flow import FlowHead
from sqap.models.heads.regression import RegressionHead
from sqap.models.heads.tokens import TokenHead
from sqap.models.inputs import ModelInputs
from sqap.models.layout import Layout
from sqap.models.storage import Weights
from sqap.models.stream import ExpertQueries, Stream
from sqap.models.through import Through


class HeadProtocol(Protocol):
    """The interface of action heads to the model, its pruner and its quantizer."""

    reads_keys_values: bool
    """Whether it reads the decoder's keys and values."""

    chain: ClassVar[str | None]
    """Name of a list of blocks, each of which reads what the one before it returns, if there is one."""

    @property
    def sensitive(self) -> tuple[str, ...]:
        """Paths of its linears that read or write actions, which a recipe treats on their own."""

    def last_tokens(self, layout: Layout) -> int:
        """How many of the last tokens' final hidden states it reads to act."""

    def expert_queries(self, inputs: ModelInputs, layout: Layout) -> ExpertQueries | None:
        """The queries of its own tokens to the decoder's keys, if it has such tokens."""

    def inputs(self, decoder: Decoder, stream: Stream, layout: Layout, inputs: ModelInputs) -> Any:
        """What actions are computed from: what it reads of a stream behind the last layer, and the noise."""

    def act(self, decoder: Decoder, inputs: Any) -> Tensor:
        """Normalised actions ``(batch, horizon, action_dim)`` from one of `inputs`."""

    def calibrate(self, inputs: Sequence[Any], through: Through) -> None:
        """Run its networks on all that they are given on the way from ``inputs`` to actions.

        Args:
            inputs: of several observations, as `inputs` returns them.
            through: runs the stages, such as to quantize them: the head, and before it perhaps parts of it.
        """


Head = DiffusionHead | FlowHead | RegressionHead | TokenHead


def make_head(config: HeadConfig, decoder: DecoderConfig, state_dim: int = 0) -> Head:
    """The head that ``config`` describes, behind a decoder of these sizes.

    Args:
        config: the head's sizes.
        decoder: the decoder's.
        state_dim: numbers of the robot's state that the head reads as a token of its own; 0 if it does not.
    """
    if isinstance(config, FlowHeadConfig):
        return FlowHead(config, decoder, state_dim)
    if isinstance(config, DiffusionHeadConfig):
        return DiffusionHead(config, decoder.width)
    if isinstance(config, TokenHeadConfig):
        return TokenHead(config, decoder.width)
    return RegressionHead(config, decoder.width)


def compressed_head(head: Head, weights: Weights | None) -> Head:
    """A head as a compressed policy has it, with what depends on a denoising step alone stored."""
    return fix_steps(head, weights) if isinstance(head, FlowHead) else head


__all__ = [
    "DiffusionHead",
    "FlowHead",
    "Head",
    "HeadProtocol",
    "RegressionHead",
    "TokenHead",
    "compressed_head",
    "make_head",
]
