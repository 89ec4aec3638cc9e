"""Policies of published sizes with random weights: a step takes as long as with the published ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from sqap.checkpoints.prismatic import prompt
from sqap.config import PolicyConfig
from sqap.models import (
    DecoderConfig,
    DiffusionHeadConfig,
    FlowHeadConfig,
    HeadConfig,
    ModelConfig,
    RegressionHeadConfig,
    TokenHeadConfig,
    VisionConfig,
    empty_model,
)
from sqap.policy import Policy
from sqap.processing import Clamp, Range, stretched
from sqap.quantization import QuantizedEmbedding, QuantizedLinear, prepare_quantized
from sqap.recipe import Recipe

# What the two encoders of Prismatic's policies have in common; of each the block before the last one is read.
VIT = VisionConfig(
    image_size=224,
    patch_size=14,
    width=1024,
    depth=24,
    heads=16,
    mlp_width=4096,
    take_block=-2,
    final_norm=False,
)
# DINOv2's, in bfloat16, as OpenVLA publishes them and vla.cpp has them.
IMAGENET = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
DINOV2 = dataclasses.replace(VIT, class_token=True, registers=4, layer_scale=True)
SIGLIP = dataclasses.replace(VIT, width=1152, depth=27, mlp_width=4304)
LLAMA = DecoderConfig(
    vocabulary=32_064, width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, mlp_width=11_008
)
DIT_B = DiffusionHeadConfig(action_dim=7, horizon=16, width=768, depth=12, heads=12)


def _prismatic(
    head: HeadConfig, *, causal: bool = True, cameras: int = 1, proprio: int | None = None
) -> ModelConfig:
    decoder = dataclasses.replace(LLAMA, causal=causal)
    return ModelConfig((DINOV2, SIGLIP), (8704, 4096, 4096), decoder, head, 1, cameras, proprio)


# SmolVLM2-500M's encoder and the first half of its decoder, LeRobot's defaults, two cameras.
SMOLVLA = ModelConfig(
    vision=(VisionConfig(512, 16, 768, 12, 12, 3072, activation="gelu_tanh"),),
    projector=(960,),
    decoder=DecoderConfig(
        49_280,
        960,
        16,
        15,
        5,
        64,
        2560,
        norm_eps=1e-5,
        causal=False,
        embed_scale=960**0.5,
        last_layer="keys_values",
    ),
    head=FlowHeadConfig(action_dim=32, horizon=50, width=720, mlp_width=2048),
    pixel_shuffle=4,
    cameras=2,
    proprio_dim=32,
    proprio_layers=1,
    image_first=True,
    projector_bias=False,
)

# PaliGemma 3B (SigLIP and Gemma 2B), and Gemma 300M as action expert; three cameras.
GEMMA_EXPERT = FlowHeadConfig(
    action_dim=32, horizon=50, width=1024, mlp_width=4096, self_attention_every=1, causal_actions=False
)
PI0 = ModelConfig(
    vision=(dataclasses.replace(SIGLIP, activation="gelu_tanh", take_block=-1, final_norm=True),),
    projector=(2048,),
    decoder=DecoderConfig(
        257_152,
        2048,
        18,
        8,
        1,
        256,
        16_384,
        causal=False,
        embed_scale=2048**0.5,
        activation="gelu_tanh",
        last_layer="keys_values",
    ),
    head=GEMMA_EXPERT,
    cameras=3,
    proprio_dim=32,
    proprio_layers=1,
    image_first=True,
    state_in="expert",
)
PI05 = dataclasses.replace(
    PI0, head=dataclasses.replace(GEMMA_EXPERT, adaptive_norms=True), proprio_dim=None, state_in="text"
)

SHAPES = {
    "cogact-7b": _prismatic(DIT_B),
    "openvla-7b": _prismatic(TokenHeadConfig(action_dim=7, vocabulary=32_064)),
    "openvla-oft-7b": _prismatic(
        RegressionHeadConfig(action_dim=7, horizon=8, width=4096), causal=False, cameras=2, proprio=8
    ),
    "smolvla": SMOLVLA,
    "pi0": PI0,
    "pi0.5": PI05,
}


def random_policy(model: ModelConfig, recipe: Recipe, device: torch.device | None = None) -> Policy:
    """A policy of this shape, quantized as the recipe says, whose weights were never anything but random.

    Drawn as integers where they are integers, so that it takes no more memory than it will have, and on the
    ``device`` that it will be on, by default the CPU.
    """
    device = device or torch.device("cpu")
    generator = torch.Generator(device=device).manual_seed(0)
    return shaped_policy(model, recipe, partial(_draw, generator=generator)).to(device)


def shaped_policy(
    model: ModelConfig, recipe: Recipe, make: Callable[[torch.nn.Module, str, torch.Tensor], torch.Tensor]
) -> Policy:
    """A policy of this shape, quantized as the recipe says.

    Args:
        model: its sizes.
        recipe: of its compression.
        make: makes a weight out of the module that has it, its name there and a tensor of its shape and type.
    """
    if recipe.quantization is not None:
        model = model.compressed
    small = empty_model(model)
    if recipe.quantization is not None:
        prepare_quantized(small, recipe.quantization)
    for module in small.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            made = make(module, name, tensor)
            if isinstance(tensor, torch.nn.Parameter):
                made = torch.nn.Parameter(made, requires_grad=False)
            setattr(module, name, made)
    width = model.head.action_dim
    config = PolicyConfig(
        family="random",
        model=model,
        cameras=tuple(f"camera{i}" for i in range(model.cameras)),
        images=tuple(
            stretched(v.image_size, *IMAGENET) if v.class_token else stretched(v.image_size)
            for v in model.vision
        ),
        actions=(_unit(width),),
        prompt=prompt(1),
        state=None if model.proprio_dim is None else (_unit(model.proprio_dim), Clamp()),
    )
    return Policy(small, config, _tokenizer(), recipe)


def _draw(module: torch.nn.Module, name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    packed = isinstance(module, QuantizedLinear | QuantizedEmbedding)
    if packed and name == "weight":
        low = 0 if like.dtype == torch.uint8 else -127
        high = 256 if like.dtype == torch.uint8 else 128
        return torch.randint(
            low, high, like.shape, dtype=like.dtype, device=generator.device, generator=generator
        )
    if packed and name == "scale":
        spread = 73.3  # of levels drawn evenly
        if isinstance(module, QuantizedLinear):
            spread = (4.6 if module.weight_bits == 4 else spread) * module.in_features**0.5
        return torch.full(like.shape, 1 / spread, dtype=torch.float32, device=generator.device)
    if like.dim() < 2:
        value = float(name in ("weight", "scale_factor"))
        return torch.full(like.shape, value, dtype=torch.float32, device=generator.device)
    table = isinstance(module, torch.nn.Embedding)
    dtype = torch.bfloat16 if table else torch.float32
    drawn = torch.empty(like.shape, dtype=dtype, device=generator.device)
    return drawn.normal_(0, 1 if table else like[0].numel() ** -0.5, generator=generator)


def _unit(width: int) -> Range:
    return Range((-1.0,) * width, (1.0,) * width, (True,) * width)


def _tokenizer() -> Tokenizer:
    """One token for every word, all the same: only their number takes time."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
