"""An OpenVLA-OFT policy as the GGUF that vla.cpp reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from peers.vla_cpp_gguf import LAYER_LINEARS, LAYER_NORMS, Contents, Entry, linears, norms, table, tensors

from sqap.errors import InputError
from sqap.models import VLA, RegressionHeadConfig
from sqap.models.vision import VisionEncoder
from sqap.policy import Policy

ARCHITECTURE = "openvla_oft"
REGISTERS = 4  # vla.cpp drops a class token and as many registers from its first encoder

# Names of tensors in vla.cpp, and in the model. ``{}`` is a block's or a layer's number.
TOWERS = {"vis.d": "vision.0", "vis.s": "vision.1"}
TOWER = {"pos": "pos_embed", "patch.weight": "patch_embed.weight", "patch.bias": "patch_embed.bias"}
PREFIX = {"cls": "cls_token", "reg": "reg_token"}
BLOCK_LINEARS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
BLOCK_NORMS = {"ln1": "norm1", "ln2": "norm2"}
BLOCK_SCALES = {"ls1": "ls1.scale_factor", "ls2": "ls2.scale_factor"}
LINEARS = {
    "vis.proj.fc1": "projector.layers.0",
    "vis.proj.fc2": "projector.layers.1",
    "vis.proj.fc3": "projector.layers.2",
    "aex.proprio.fc1": "proprio.layers.0",
    "aex.proprio.fc2": "proprio.layers.1",
    "aex.head.fc1": "head.fc1",
    "aex.head.fc2": "head.fc2",
}
NORMS = {"aex.head.ln1": "head.norm1", "aex.head.ln2": "head.norm2", "lm.output_norm": "decoder.norm"}


def contents(policy: Policy) -> Contents:
    """Tensors and settings of the policy, compressed or not, as the file has them.

    Raises:
        InputError: it is no OpenVLA-OFT policy with two encoders and a state.
    """
    _check(policy.model)
    entries = [*_vision(policy.model), *_decoder(policy.model), *_rest(policy.model)]
    return Contents(ARCHITECTURE, keys(policy), entries)


def keys(policy: Policy) -> dict[str, int | float]:
    """The sizes that vla.cpp is told, without the architecture's name before them."""
    config, model = policy.config.model, policy.model
    decoder, head = config.decoder, cast(RegressionHeadConfig, config.head)
    found: dict[str, int | float] = {}
    for tag, vision, encoder in zip(("dino", "sig"), config.vision, model.vision, strict=True):
        found |= {
            f"vit.{tag}.hidden": vision.width,
            f"vit.{tag}.layers": len(cast(VisionEncoder, encoder).blocks),
            f"vit.{tag}.heads": vision.heads,
            f"vit.{tag}.head_dim": vision.width // vision.heads,
            f"vit.{tag}.inter": vision.mlp_width,
        }
    first = config.vision[0]
    return found | {
        "vit.image_size": first.image_size,
        "vit.patch_size": first.patch_size,
        "vit.n_patches": first.grid**2,
        "vit.ln_eps": first.norm_eps,
        "vit.proj_mid": config.projector[0],
        "vit.vdim": sum(vision.width for vision in config.vision),
        "vit.num_images": config.cameras,
        "lm.hidden": decoder.width,
        "lm.layers": decoder.depth,
        "lm.q_heads": decoder.heads,
        "lm.kv_heads": decoder.kv_heads,
        "lm.head_dim": decoder.head_dim,
        "lm.inter": decoder.mlp_width,
        "lm.vocab": decoder.vocabulary,
        "lm.rope_theta": decoder.rope_theta,
        "lm.rms_eps": decoder.norm_eps,
        "action.chunk": head.horizon,
        "action.action_dim": head.action_dim,
        "action.proprio_dim": config.proprio_dim or 0,
        "action.head_hidden": head.width,
        "action.head_blocks": head.depth,
        "action.head_ln_eps": 1e-5,
        "tokens.stop_id": policy.config.prompt.append[-1],
    }


def _check(model: VLA) -> None:
    config = model.config
    prefixes = [(vision.class_token, vision.registers) for vision in config.vision]
    if (
        not isinstance(config.head, RegressionHeadConfig)
        or prefixes != [(True, REGISTERS), (False, 0)]
        or config.proprio_dim is None
        or config.decoder.causal
    ):
        raise InputError(
            "vla.cpp's OpenVLA-OFT is DINOv2 and SigLIP, a state, and a decoder that sees both ways"
        )


def _vision(model: VLA) -> Iterator[Entry]:
    for (name, path), encoder in zip(TOWERS.items(), model.vision, strict=True):
        blocks = cast(VisionEncoder, encoder).blocks
        tower = TOWER | (PREFIX if name == "vis.d" else {})
        yield from tensors(model, {f"{name}.{n}": f"{path}.{p}" for n, p in tower.items()})
        for i in range(len(blocks)):
            here, there = f"{name}.blk.{i}", f"{path}.blocks.{i}"
            yield from linears(model, BLOCK_LINEARS, here, there)
            yield from norms(model, BLOCK_NORMS, here, there)
            if name == "vis.d":
                scales = {f"{here}.{n}": f"{there}.{p}" for n, p in BLOCK_SCALES.items()}
                yield from tensors(model, scales)


def _decoder(model: VLA) -> Iterator[Entry]:
    yield table(model)
    for i in range(len(model.decoder.layers)):
        yield from linears(model, LAYER_LINEARS, f"lm.blk.{i}", f"decoder.layers.{i}")
        yield from norms(model, LAYER_NORMS, f"lm.blk.{i}", f"decoder.layers.{i}")


def _rest(model: VLA) -> Iterator[Entry]:
    yield from linears(model, LINEARS)
    yield from norms(model, NORMS)
    for i in range(cast(RegressionHeadConfig, model.config.head).depth):
        yield from linears(model, {"lin": "fc"}, f"aex.head.blk.{i}", f"head.blocks.{i}")
        yield from norms(model, {"ln": "norm"}, f"aex.head.blk.{i}", f"head.blocks.{i}")
