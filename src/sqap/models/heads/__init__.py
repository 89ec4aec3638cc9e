"""Action heads: from the decoder's input sequence to a normalised action chunk.

A head runs the decoder itself, because families differ in how: once, for the last token or for many, or once
per action token.
"""

from __future__ import annotations

from sqap.models.config import (
    DecoderConfig,
    DiffusionHeadConfig,
    FlowHeadConfig,
    HeadConfig,
    TokenHeadConfig,
)
from sqap.models.heads.diffusion import DiffusionHead
from sqap.models.heads.flow import FlowHead
from sqap.models.heads.regression import RegressionHead
from sqap.models.heads.tokens import TokenHead

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


__all__ = ["DiffusionHead", "FlowHead", "Head", "RegressionHead", "TokenHead", "make_head"]
