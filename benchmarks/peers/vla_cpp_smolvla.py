"""A SmolVLA policy as the GGUF that vla.cpp reads; it takes no types of matrices but bfloat16 and float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import cast

import numpy as np
import torch
from peers.vla_cpp_gguf import (
    LAYER_LINEARS,
    LAYER_NORMS,
    Contents,
    Entry,
    bias,
    linears,
    norms,
    table,
    tensors,
    weight,
)
from torch import Tensor, nn

from sqap.benchmark.dense import dense_weight
from sqap.errors import InputError
from sqap.models import VLA, FlowHeadConfig
from sqap.models.heads import FlowHead
from sqap.policy import Policy

ARCHITECTURE, PRECISIONS = "smolvla", ("bf16", "f32")
# vla.cpp's own, which its file does not say.
VOCABULARY, NORM_EPS, ROPE_THETA = 49_280, 1e-5, 10_000.0
LONGEST = 48  # text tokens, to which vla.cpp pads, where the policy has no limit

# Names of tensors in vla.cpp, and in the model.
VISION = {
    "vit.patch_embd.weight": "vision.0.patch_embed.weight",
    "vit.patch_embd.bias": "vision.0.patch_embed.bias",
    "vit.pos_embd": "vision.0.pos_embed",
}
BLOCK_LINEARS = {"attn_o": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
BLOCK_NORMS = {"ln1": "norm1", "ln2": "norm2"}
# Linears that it multiplies with in float32.
WIDE = {
    "state_proj": "proprio.layers.0",
    "action_in_proj": "head.action_in_proj",
    "action_time_mlp_out": "head.action_time_mlp_out",
    "action_out_proj": "head.action_out_proj",
}
NORMS = {
    "vit.post_ln": "vision.0.norm",
    "vlm.output_norm": "decoder.norm",
    "aex.output_norm": "head.norm",
}


def contents(policy: Policy) -> Contents:
    """Tensors and settings of the policy, compressed or not, as the file has them.

    Raises:
        InputError: it is no SmolVLA.
    """
    model = policy.model
    _check(model)
    entries = [*_vision(model), table(model), *_decoder(model), *_expert(model)]
    entries += [*linears(model, WIDE, matrix=False), *norms(model, NORMS), *_identity(model)]
    return Contents(ARCHITECTURE, keys(policy), entries)


def keys(policy: Policy) -> dict[str, int | float]:
    """The sizes that vla.cpp is told, without the architecture's name before them."""
    config = policy.config.model
    (vision,), decoder, head = config.vision, config.decoder, cast(FlowHeadConfig, config.head)
    return {
        "hidden": decoder.width,
        "intermediate": decoder.mlp_width,
        "n_q_heads": decoder.heads,
        "n_kv_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "n_layers": decoder.depth,
        "vocab_size": decoder.vocabulary,
        "expert_h": head.width,
        "expert_inter": head.mlp_width,
        "chunk_size": head.horizon,
        "num_steps": head.sample_steps,
        "max_state_dim": config.proprio_dim or 0,
        "max_action_dim": head.action_dim,
        "real_state_dim": config.proprio_dim or 0,
        "real_action_dim": head.action_dim,
        "self_attn_every_n_layers": head.self_attention_every,
        "tokenizer_max_length": policy.config.prompt.longest or LONGEST,
        "min_period": np.float64(head.min_period),
        "max_period": np.float64(head.max_period),
        "norm_eps": 0.0,
        "vit_hidden": vision.width,
        "vit_layers": vision.depth,
        "vit_heads": vision.heads,
        "vit_inter": vision.mlp_width,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "vit_pixel_shuffle": config.pixel_shuffle,
        "n_img_tokens": (vision.grid // config.pixel_shuffle) ** 2,
        "vit_ln_eps": vision.norm_eps,
    }


def _check(model: VLA) -> None:
    config = model.config
    decoder = config.decoder
    fixed = decoder.vocabulary, decoder.norm_eps, decoder.rope_theta, decoder.embed_scale
    if (
        not isinstance(config.head, FlowHeadConfig)
        or config.head.adaptive_norms
        or config.state_in != "decoder"
        or config.proprio_layers != 1
        or fixed != (VOCABULARY, NORM_EPS, ROPE_THETA, math.sqrt(decoder.width))
    ):
        raise InputError(
            f"vla.cpp's SmolVLA has SmolVLM2's decoder, with {VOCABULARY} tokens, and a flow-matching expert"
        )


def _vision(model: VLA) -> Iterator[Entry]:
    yield from tensors(model, VISION)
    for i in range(model.config.vision[0].depth):
        here, there = f"vit.blk.{i}", f"vision.0.blocks.{i}"
        yield from _split(model, here, f"{there}.attn.qkv")
        yield from linears(model, BLOCK_LINEARS, here, there)
        yield from norms(model, BLOCK_NORMS, here, there)
    path, scale = "projector.layers.0", model.config.decoder.embed_scale
    linear = cast(nn.Linear, model.get_submodule(path))
    # vla.cpp scales what comes from images as it scales the embeddings of text.
    shape = linear.out_features, linear.in_features
    yield Entry("mm.fc.weight", shape, lambda: weight(model, path) / scale, matrix=True)


def _split(model: VLA, here: str, path: str) -> Iterator[Entry]:
    """The three linears that one linear for queries, keys and values stands for."""
    linear = cast(nn.Linear, model.get_submodule(path))
    shape = linear.out_features // 3, linear.in_features

    def part(make: partial[Tensor], i: int) -> Tensor:
        return make().chunk(3)[i]

    for i, name in enumerate(("attn_q", "attn_k", "attn_v")):
        whole = partial(weight, model, path), partial(bias, model, path)
        yield Entry(f"{here}.{name}.weight", shape, partial(part, whole[0], i), matrix=True)
        yield Entry(f"{here}.{name}.bias", shape[:1], partial(part, whole[1], i), matrix=False)


def _decoder(model: VLA) -> Iterator[Entry]:
    first = [*_layer(model, "vlm.blk.0", "decoder.layers.0")]
    for i in range(model.config.decoder.depth):
        here = f"vlm.blk.{i}"
        found = {entry.name: entry for entry in _layer(model, here, f"decoder.layers.{i}")}
        for name, shape, _, matrix in first:
            name = name.replace("vlm.blk.0", here)
            # Of the last layer only keys and values are read: vla.cpp loads the rest, and computes without.
            yield found.get(name) or Entry(name, shape, partial(torch.zeros, shape), matrix)


def _layer(model: VLA, here: str, there: str) -> Iterator[Entry]:
    parts = {name for name, _ in model.get_submodule(there).named_modules()}
    yield from linears(model, {n: p for n, p in LAYER_LINEARS.items() if p in parts}, here, there)
    yield from norms(model, {n: p for n, p in LAYER_NORMS.items() if p in parts}, here, there)


def _expert(model: VLA) -> Iterator[Entry]:
    for i in range(model.config.decoder.depth):
        yield from _layer(model, f"aex.blk.{i}", f"head.layers.{i}")
    head = cast(FlowHead, model.head)
    width = head.config.width
    name, shape = "action_time_mlp_in", (width, 2 * width)
    yield Entry(f"{name}.weight", shape, lambda: _action_time(head)[0], matrix=False)
    yield Entry(f"{name}.bias", shape[:1], lambda: _action_time(head)[1], matrix=False)


def _action_time(head: FlowHead) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear that reads actions and time.

    A compressed policy stores its bias for each denoising step instead of the part that reads the time: one
    that gives the same biases is found by least squares, exactly, since there are more channels than steps.
    """
    linear = head.action_time_mlp_in
    found = dense_weight(linear)
    if not head.config.fixed_steps:
        return found, linear.bias.float()
    times = head.embedded_times(head.times, found.device).double()
    of_time = torch.linalg.pinv(times) @ head.action_time_bias.double()
    return torch.cat([found, of_time.T.float()], dim=1), found.new_zeros(len(found))


def _identity(model: VLA) -> Iterator[Entry]:
    """Statistics that change nothing: sqap normalises states and actions."""
    sizes = {"state": model.config.proprio_dim or 0, "action": model.config.head.action_dim}
    for name, size in sizes.items():
        yield Entry(f"{name}_mean", (size,), partial(torch.zeros, size), matrix=False)
        yield Entry(f"{name}_std", (size,), partial(torch.ones, size), matrix=False)
