"""A small policy with random gains and biases, so that nothing passes because a weight is one or zero."""

from collections.abc import Callable

import pytest
import torch

from sqap.models import VLA, DecoderConfig, DiffusionHeadConfig, ModelConfig, ModelInputs, VisionConfig
from sqap.models.decoder import RMSNorm

MakeModel = Callable[..., VLA]
TOKENS = torch.tensor([[1, 5, 9, 2, 7], [1, 3, 3, 8, 4]])


@pytest.fixture
def make_model() -> MakeModel:
    """Build a policy: ``make_model(width=192, heads=3)``; the same call gives the same weights."""

    def make(width: int = 128, heads: int = 2, kv_heads: int = 1, head_dim: int = 64, mlp: int = 640) -> VLA:
        torch.manual_seed(0)
        config = ModelConfig(
            vision=(VisionConfig(image_size=32, patch_size=8, width=32, depth=1, heads=2, mlp_width=64),),
            projector=(48, width),
            decoder=DecoderConfig(16, width, 2, heads, kv_heads, head_dim, mlp),
            head=DiffusionHeadConfig(action_dim=4, horizon=8, width=32, depth=1, heads=2),
        )
        model = VLA(config).eval()
        for module in model.modules():
            if isinstance(module, RMSNorm):
                torch.nn.init.uniform_(module.weight, 0.3, 3.0)
        return model

    return make


@pytest.fixture
def inputs() -> ModelInputs:
    """A batch of two."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return ModelInputs([pixels], TOKENS, torch.randn(2, 8, 4, generator=generator))
