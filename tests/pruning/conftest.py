from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from sqap.models import VLA, DecoderConfig, DiffusionHeadConfig, ModelConfig, VisionConfig


@pytest.fixture(scope="session")
def model() -> VLA:
    """A random policy with 16 visual tokens and 4 decoder layers, in float64 for tight comparisons."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=4, width=8, depth=1, heads=2, mlp_width=16)
    decoder = DecoderConfig(vocabulary=32, width=16, depth=4, heads=4, kv_heads=2, head_dim=8, mlp_width=32)
    head = DiffusionHeadConfig(action_dim=2, horizon=2, width=8, depth=1, heads=2, sample_steps=2)
    vla = VLA(ModelConfig((vision,), (16, 16), decoder, head)).double().eval().requires_grad_(False)
    layers: Iterable[Any] = vla.decoder.layers
    for layer in layers:
        layer.self_attn.q_proj.weight.mul_(6)  # a flat attention map would rank nothing
    return vla


@pytest.fixture(scope="session")
def pixels() -> list[torch.Tensor]:
    return [torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    return torch.tensor([[1, 7, 3, 9, 2, 30]])
