"""The vision encoder against DINOv2 with registers and SigLIP as transformers computes them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from sqap.models import VisionConfig
from sqap.models.vision import VisionEncoder

TOLERANCE = 1e-4

DINO = VisionConfig(
    image_size=56,
    patch_size=14,
    width=32,
    depth=4,
    heads=4,
    mlp_width=128,
    class_token=True,
    registers=4,
    layer_scale=True,
    activation="gelu",
)
SIGLIP = VisionConfig(
    image_size=56, patch_size=14, width=32, depth=4, heads=4, mlp_width=80, activation="gelu_tanh"
)

# Ours on the left. A list is concatenated, as three projections are fused into one.
DINO_NAMES: dict[str, str | list[str]] = {
    "pos_embed": "embeddings.position_embeddings",
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "blocks": "encoder.layer",
    "norm1": "norm1",
    "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "attn.proj": "attention.o_proj",
    "ls1.scale_factor": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls2.scale_factor": "layer_scale2.lambda1",
}
SIGLIP_NAMES: dict[str, str | list[str]] = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def randomize(model: nn.Module) -> None:
    """Draw every parameter so that leaving any of them out would show."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or "lambda1" in name:
            parameter.data = 0.7 + 0.3 * draw
        elif "weight" in name and "embedding.weight" not in name:
            parameter.data = draw * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.5 * draw


def dino() -> Dinov2WithRegistersModel:
    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=DINO.width,
            num_hidden_layers=DINO.depth,
            num_attention_heads=DINO.heads,
            image_size=DINO.image_size,
            patch_size=DINO.patch_size,
            num_register_tokens=DINO.registers,
            layer_norm_eps=DINO.norm_eps,
        )
    )
    randomize(model)
    return model.eval()


def siglip() -> SiglipVisionModel:
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=SIGLIP.width,
            intermediate_size=SIGLIP.mlp_width,
            num_hidden_layers=SIGLIP.depth,
            num_attention_heads=SIGLIP.heads,
            image_size=SIGLIP.image_size,
            patch_size=SIGLIP.patch_size,
            layer_norm_eps=SIGLIP.norm_eps,
            vision_use_head=False,
        )
    )
    randomize(model)
    return model.eval()


def ours(config: VisionConfig, theirs: nn.Module, names: dict[str, str | list[str]]) -> VisionEncoder:
    """Our encoder with their weights; every tensor of ours must be found among theirs."""
    encoder, state = VisionEncoder(config), theirs.state_dict()
    if config.class_token:  # its position, which only DINOv2's own layout keeps apart from it
        positions = state["embeddings.position_embeddings"][0]
        state["embeddings.cls_token"] = state["embeddings.cls_token"] + positions[0]
        state["embeddings.position_embeddings"] = positions[1:]

    def find(name: str) -> Tensor:
        stem, end = (name.rsplit(".", 1)) if name.endswith((".weight", ".bias")) else (name, "")
        prefix = ""
        if stem.startswith("blocks."):
            _, index, stem = stem.split(".", 2)
            prefix = f"{names['blocks']}.{index}."
        sources = names[stem] if isinstance(names[stem], list) else [names[stem]]
        return torch.cat([state[f"{prefix}{source}.{end}".rstrip(".")] for source in sources])

    mapped = {name: find(name).reshape(value.shape) for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(mapped, strict=True)
    return encoder.eval()


def images(config: VisionConfig) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, config.image_size, config.image_size, generator=generator)


@torch.no_grad()
def test_dino_last_block_with_norm() -> None:
    theirs = dino()
    encoder = ours(DINO, theirs, DINO_NAMES)

    tokens = encoder(images(DINO))

    expected = theirs(images(DINO)).last_hidden_state[:, 1 + DINO.registers :]
    assert tokens.shape == (2, 16, DINO.width)
    torch.testing.assert_close(tokens, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_siglip_last_block_with_norm() -> None:
    theirs = siglip()
    encoder = ours(SIGLIP, theirs, SIGLIP_NAMES)

    tokens = encoder(images(SIGLIP))

    assert tokens.shape == (2, 16, SIGLIP.width)
    torch.testing.assert_close(tokens, theirs(images(SIGLIP)).last_hidden_state, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("take_block", [-2, -3, 0, 2])
@torch.no_grad()
def test_dino_inner_block_without_norm(take_block: int) -> None:
    theirs = dino()
    config = dataclasses.replace(DINO, take_block=take_block, final_norm=False)
    encoder = ours(config, theirs, DINO_NAMES)

    tokens = encoder(images(DINO))

    after_block = theirs(images(DINO), output_hidden_states=True).hidden_states[1:]
    expected = after_block[take_block][:, 1 + DINO.registers :]
    torch.testing.assert_close(tokens, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_siglip_second_to_last_block_without_norm() -> None:
    theirs = siglip()
    config = dataclasses.replace(SIGLIP, take_block=-2, final_norm=False)
    encoder = ours(config, theirs, SIGLIP_NAMES)

    tokens = encoder(images(SIGLIP))

    after_block = theirs(images(SIGLIP), output_hidden_states=True).hidden_states[1:]
    torch.testing.assert_close(tokens, after_block[-2], atol=TOLERANCE, rtol=0)


def test_blocks_that_are_not_read_do_not_exist() -> None:
    assert len(VisionEncoder(DINO).blocks) == 4
    assert len(VisionEncoder(dataclasses.replace(DINO, take_block=-2)).blocks) == 3
    assert len(VisionEncoder(dataclasses.replace(DINO, take_block=1)).blocks) == 2


@torch.no_grad()
def test_tokens_are_row_major() -> None:
    encoder = VisionEncoder(dataclasses.replace(SIGLIP, depth=0, final_norm=False))
    image = torch.zeros(1, 3, 56, 56)
    changed = image.clone()
    changed[:, :, 14:28, 42:56] = 1  # second row, fourth column

    differs = (encoder(changed) - encoder(image)).abs().amax(-1)[0] > 1e-6

    assert differs.nonzero().flatten().tolist() == [1 * 4 + 3]


@torch.no_grad()
def test_convolutional_stem_reaches_the_grid() -> None:
    config = VisionConfig(
        image_size=64, patch_size=8, width=16, depth=1, heads=2, mlp_width=32, stem="convolutions"
    )
    assert VisionEncoder(config)(images(config)).shape == (2, 64, 16)
