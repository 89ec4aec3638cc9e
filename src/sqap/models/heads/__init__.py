"""Action heads: from the decoder's input sequence to a normalised action chunk.

A head runs the decoder itself, because families differ in how: once, for the last token or for many, or once
per action token.
"""

from __future__ import annotations

from sqap.models.config import DiffusionHeadConfig, HeadConfig, TokenHeadConfig
from sqap.models.heads.diffusion import DiffusionHead
from sqap.models.heads.regression import RegressionHead
from sqap.models.heads.tokens import TokenHead

Head = DiffusionHead | RegressionHead | TokenHead


def make_head(config: HeadConfig, width: int) -> Head:
    """The head that ``config`` describes, behind a decoder of ``width``."""
    if isinstance(config, DiffusionHeadConfig):
        return DiffusionHead(config, width)
    if isinstance(config, TokenHeadConfig):
        return TokenHead(config, width)
    return RegressionHead(config, width)


__all__ = ["DiffusionHead", "Head", "RegressionHead", "TokenHead", "make_head"]
