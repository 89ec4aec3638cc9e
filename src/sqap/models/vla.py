"""The whole model, its four parts in the order the data takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sqap.models.config import ModelConfig
from sqap.models.decoder import Decoder, TokenPruner
from sqap.models.heads.diffusion import DiffusionHead
from sqap.models.projector import Projector
from sqap.models.vision import VisionEncoder

# Visual tokens stand right after the first text token (BOS), as in OpenVLA and CogACT.
VISUAL_START = 1


class VLA(nn.Module):
    """Pixels and token ids to a normalised action chunk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = nn.ModuleList(VisionEncoder(c) for c in config.vision)
        features = sum(c.width for c in config.vision) * config.pixel_shuffle**2
        self.projector = Projector(features, config.projector)
        self.decoder = Decoder(config.decoder)
        self.head = DiffusionHead(config.head, config.decoder.width)

    def see(self, pixels: Sequence[Tensor]) -> Tensor:
        """One ``(batch, 3, size, size)`` per encoder to visual tokens ``(batch, N, decoder width)``."""
        features = [encoder(p) for encoder, p in zip(self.vision, pixels, strict=True)]
        out: Tensor = self.projector(pixel_shuffle(torch.cat(features, dim=-1), self.config.pixel_shuffle))
        return out

    def sequence(self, visual: Tensor, token_ids: Tensor) -> Tensor:
        """The decoder's input ``(batch, 1 + N + rest, width)``: BOS, visual tokens, the other text."""
        text = self.decoder.embed_tokens(token_ids)
        return torch.cat([text[:, :VISUAL_START], visual.to(text), text[:, VISUAL_START:]], dim=1)

    def cognition(self, visual: Tensor, token_ids: Tensor, pruner: TokenPruner | None = None) -> Tensor:
        """The last token's final hidden state ``(batch, width)``: all the head gets to know."""
        hidden: Tensor = self.decoder(self.sequence(visual, token_ids), pruner=pruner)
        return hidden[:, -1]

    def forward(
        self,
        pixels: Sequence[Tensor],
        token_ids: Tensor,
        noise: Tensor,
        pruner: TokenPruner | None = None,
    ) -> Tensor:
        """Normalised actions ``(batch, horizon, action_dim)`` from diffusion noise of that shape."""
        condition = self.cognition(self.see(pixels), token_ids, pruner)
        out: Tensor = self.head(condition, noise)
        return out


def pixel_shuffle(x: Tensor, side: int) -> Tensor:
    """Patches ``(batch, grid * grid, width)`` to squares of them ``(batch, tokens, side * side * width)``."""
    if side == 1:
        return x
    batch, patches, width = x.shape
    grid = math.isqrt(patches) // side
    squares = x.view(batch, grid, side, grid, side, width).transpose(2, 3)
    return squares.reshape(batch, grid * grid, side * side * width)
