"""A policy small enough for every test, with the reference policy's layout."""

from __future__ import annotations

import pytest
import torch

from sqap.models import VLA, DecoderConfig, DiffusionHeadConfig, ModelConfig, ModelInputs, VisionConfig


@pytest.fixture
def config() -> ModelConfig:
    """Two encoders on one grid of 4 x 4 patches, as in OpenVLA; grouped-query attention; guidance."""
    dino = VisionConfig(
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
    small = VisionConfig(
        image_size=32, patch_size=8, width=24, depth=2, heads=2, mlp_width=48, stem="convolutions"
    )
    return ModelConfig(
        vision=(dino, small),
        projector=(64, 32),
        decoder=DecoderConfig(
            vocabulary=20, width=32, depth=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48
        ),
        head=DiffusionHeadConfig(action_dim=4, horizon=6, width=32, depth=2, heads=2),
    )


@pytest.fixture
def model(config: ModelConfig) -> VLA:
    torch.manual_seed(0)
    return VLA(config).eval()


@pytest.fixture
def inputs(config: ModelConfig) -> ModelInputs:
    """A batch of three."""
    return random_inputs(config, 3)


def random_inputs(config: ModelConfig, batch: int) -> ModelInputs:
    """Noise for everything that a model of this configuration reads; BOS first, as ever."""
    generator = torch.Generator().manual_seed(1)
    pixels = [
        torch.randn(batch * config.cameras, 3, c.image_size, c.image_size, generator=generator)
        for c in config.vision
    ]
    token_ids = torch.randint(0, config.decoder.vocabulary, (batch, 5), generator=generator)
    noise = torch.randn(batch, config.head.horizon, config.head.action_dim, generator=generator)
    proprio = torch.randn(batch, config.proprio_dim, generator=generator) if config.proprio_dim else None
    return ModelInputs(pixels, token_ids, noise, proprio)
