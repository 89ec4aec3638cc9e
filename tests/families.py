"""One small policy of every family, with random weights: CogACT, OpenVLA, OpenVLA-OFT and SmolVLA."""

from __future__ import annotations

import dataclasses

import torch

from sqap.models import (
    VLA,
    DecoderConfig,
    DiffusionHeadConfig,
    FlowHeadConfig,
    ModelConfig,
    ModelInputs,
    RegressionHeadConfig,
    TokenHeadConfig,
    VisionConfig,
)
from sqap.models.decoder import RMSNorm

FAMILIES = ("diffusion", "tokens", "regression", "flow")

DINO = VisionConfig(
    image_size=32,
    patch_size=8,
    width=16,
    depth=3,
    heads=2,
    mlp_width=32,
    class_token=True,
    registers=4,
    layer_scale=True,
    take_block=-2,
    final_norm=False,
)
CONVOLUTIONAL = VisionConfig(
    image_size=32, patch_size=8, width=24, depth=2, heads=2, mlp_width=48, stem="convolutions"
)
DECODER = DecoderConfig(vocabulary=20, width=32, depth=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48)


def family_config(family: str) -> ModelConfig:
    """A grid of 4 x 4 visual tokens and grouped-query attention, otherwise as different as families get."""
    if family == "diffusion":
        head = DiffusionHeadConfig(action_dim=4, horizon=6, width=32, depth=2, heads=2)
        return ModelConfig((DINO, CONVOLUTIONAL), (64, 32), DECODER, head)
    if family == "tokens":
        tokens = TokenHeadConfig(action_dim=4, vocabulary=20, bins=9, last_token=17)
        return ModelConfig((DINO, CONVOLUTIONAL), (64, 32), DECODER, tokens)
    if family == "flow":
        flow = FlowHeadConfig(action_dim=4, horizon=6, width=24, mlp_width=40)
        large = dataclasses.replace(CONVOLUTIONAL, image_size=64)
        decoder = dataclasses.replace(DECODER, causal=False, embed_scale=32**0.5)
        return ModelConfig(
            (large,),
            (32,),
            decoder,
            flow,
            pixel_shuffle=2,
            cameras=2,
            proprio_dim=5,
            proprio_layers=1,
            image_first=True,
            projector_bias=False,
        )
    film = dataclasses.replace(DINO, film=True), dataclasses.replace(CONVOLUTIONAL, film=True)
    decoder = dataclasses.replace(DECODER, causal=False)
    regression = RegressionHeadConfig(action_dim=4, horizon=6, width=24)
    return ModelConfig(film, (64, 32), decoder, regression, cameras=2, proprio_dim=5)


def random_model(config: ModelConfig) -> VLA:
    """The same weights every time; no norm's gain is one."""
    torch.manual_seed(0)
    model = VLA(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.3, 3.0)
    return model


def random_inputs(config: ModelConfig, batch: int, seed: int = 1) -> ModelInputs:
    """Noise for everything that a model of this configuration reads."""
    generator = torch.Generator().manual_seed(seed)
    pixels = [
        torch.randn(batch * config.cameras, 3, c.image_size, c.image_size, generator=generator)
        for c in config.vision
    ]
    token_ids = torch.randint(0, config.decoder.vocabulary, (batch, 5), generator=generator)
    noise = torch.randn(batch, config.head.horizon, config.head.action_dim, generator=generator)
    proprio = torch.randn(batch, config.proprio_dim, generator=generator) if config.proprio_dim else None
    return ModelInputs(pixels, token_ids, noise, proprio)
