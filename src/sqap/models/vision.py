"""The vision encoder: a pre-norm ViT that covers DINOv2 with registers, SigLIP and the small ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sqap.models.config import VisionConfig
from sqap.models.edges import Edge
from sqap.models.through import Through, direct
from sqap.models.transformer import MLP, Fused, SelfAttention


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (DINOv2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class FiLM(nn.Module):
    """Features scaled and shifted, channel by channel, by what the instruction says (Perez et al. 2018)."""

    edges = Edge("scale", reads="residual"), Edge("shift", reads="residual")

    def __init__(self, language_width: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Linear(language_width, width)
        self.shift = nn.Linear(language_width, width)

    def forward(self, x: Tensor, language: Tensor) -> Tensor:
        """``x`` ``(batch, tokens, width)`` and ``language`` ``(batch, language width)``."""
        out: Tensor = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and on a residual branch; FiLM, if any, between the two."""

    fused: Fused | None = None

    def __init__(self, config: VisionConfig, language_width: int) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = SelfAttention(width, config.heads)
        self.ls1 = LayerScale(width) if config.layer_scale else nn.Identity()
        self.film = FiLM(language_width, width) if config.film else None
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.mlp_width, config.activation)
        self.ls2 = LayerScale(width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, language: Tensor | None = None) -> Tensor:
        done = None if self.fused is None else self.fused(self, x)
        if done is not None:
            return done[0]
        x = x + self.ls1(self.attn(self.norm1(x)))
        if self.film is not None:
            x = self.film(x, language)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class VisionEncoder(nn.Module):
    """An image to one token per patch, row by row from the top left.

    Args:
        config: sizes.
        language_width: of the mean text embedding that modulates an encoder with FiLM.
    """

    def __init__(self, config: VisionConfig, language_width: int = 0) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = _stem(config)
        self.pos_embed = nn.Parameter(nn.init.normal_(torch.empty(config.grid**2, config.width), std=0.02))
        self.cls_token = nn.Parameter(torch.zeros(1, config.width)) if config.class_token else None
        self.reg_token = (
            nn.Parameter(torch.zeros(config.registers, config.width)) if config.registers else None
        )
        # Blocks after the one that is read would be computed for nothing.
        depth = config.depth + 1 + config.take_block if config.take_block < 0 else config.take_block + 1
        self.blocks = nn.ModuleList(Block(config, language_width) for _ in range(depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.final_norm else nn.Identity()

    def forward(self, pixels: Tensor, language: Tensor | None = None) -> Tensor:
        """``(batch, 3, image_size, image_size)`` normalised to ``(batch, grid * grid, width)``."""
        (out,) = self.run([pixels], [language])
        return out

    def run(
        self,
        pixels: Sequence[Tensor],
        language: Sequence[Tensor | None],
        through: Through = direct,
        name: str = "vision",
    ) -> list[Tensor]:
        """`forward` of several inputs, block by block; ``name`` is the encoder's in its model."""
        states = [self.embed(x) for x in pixels]
        for j, block in enumerate(self.blocks):
            pairs = list(zip(states, language, strict=True))
            states = through(f"{name}.blocks.{j}", block, pairs, lambda stage, pair: stage(*pair))
        return [self.features(x) for x in states]

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels of any type to what the blocks are given: ``(batch, prefix + grid * grid, width)``."""
        pixels = pixels.to(self.pos_embed.dtype)
        patches: Tensor = self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        return torch.cat([*(token.expand(len(patches), -1, -1) for token in prefix), patches], dim=1)

    def features(self, x: Tensor) -> Tensor:
        """What the blocks return to the patches' features ``(batch, grid * grid, width)``."""
        out: Tensor = self.norm(x)
        return out[:, int(self.config.class_token) + self.config.registers :]


def _stem(config: VisionConfig) -> nn.Module:
    if config.stem == "patch":
        return nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
    layers: list[nn.Module] = []
    channels, halvings = 3, config.patch_size.bit_length() - 1
    for i in range(halvings):
        wider = config.width >> (halvings - 1 - i)
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.GELU()]
        channels = wider
    return nn.Sequential(*layers, nn.Conv2d(channels, config.width, 1))
