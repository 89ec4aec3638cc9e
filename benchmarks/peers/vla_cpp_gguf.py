"""An OpenVLA-OFT policy as the GGUF that vla.cpp reads, its weights in any of the types that it takes.

Names, keys and layouts are those of vla.cpp's architecture ``openvla_oft``. What is multiplied with is stored
in the type asked for wherever vla.cpp's own quantizer would: not the embedding table, and no matrix whose
rows blocks of 32 do not divide. Such matrices are bfloat16, everything else float32. vla.cpp rotates nothing
as it runs, so a rotated decoder is written in the basis that it had before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from sqap.benchmark.dense import dense_weight
from sqap.errors import InputError
from sqap.models import VLA, RegressionHeadConfig
from sqap.models.edges import edges_of
from sqap.models.vision import VisionEncoder
from sqap.policy import Policy
from sqap.quantization.rotation import RotatedNorm

ARCHITECTURE = "openvla_oft"
REGISTERS = 4  # vla.cpp drops a class token and as many registers from its first encoder
EMBEDDING = "token_embd.weight"

# What vla.cpp calls the tensors, and where they are in the model. ``{}`` is a block's or a layer's number.
TOWERS = {"vis.d": "vision.0", "vis.s": "vision.1"}
TOWER = {"pos": "pos_embed", "patch.weight": "patch_embed.weight", "patch.bias": "patch_embed.bias"}
PREFIX = {"cls": "cls_token", "reg": "reg_token"}
BLOCK_LINEARS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
BLOCK_NORMS = {"ln1": "norm1", "ln2": "norm2"}
BLOCK_SCALES = {"ls1": "ls1.scale_factor", "ls2": "ls2.scale_factor"}
LAYER_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
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


class Entry(NamedTuple):
    """A tensor of the file: what gives it as float32, and whether it is what is multiplied with."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    matrix: bool

    def kind(self, wanted: Type) -> Type:
        """The type that it is stored in if matrices are to be ``wanted``."""
        if not self.matrix:
            return Type.F32
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        plain = block > 1 and (self.name == EMBEDDING or self.shape[-1] % block)
        return Type.BF16 if plain else wanted


def write(policy: Policy, path: Path, precision: str) -> int:
    """Write the policy, compressed or not, as what vla.cpp reads; bytes of its weights.

    Args:
        policy: packed weights are written as the floats they stand for, rounded to ``precision``.
        path: the file; no more than one tensor of it is in memory at a time.
        precision: one of `PRECISIONS`.

    Raises:
        InputError: it is no OpenVLA-OFT policy with two encoders and a state.
    """
    _check(policy.model)
    entries = [*_vision(policy.model), *_decoder(policy.model), *_rest(policy.model)]
    kinds = [entry.kind(Type[precision.upper()]) for entry in entries]
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.architecture", ARCHITECTURE)
    for name, value in keys(policy).items():
        add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{ARCHITECTURE}.{name}", value)
    sizes = [_nbytes(entry.shape, kind) for entry, kind in zip(entries, kinds, strict=True)]
    for entry, kind, nbytes in zip(entries, kinds, sizes, strict=True):
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, kind in zip(entries, kinds, strict=True):
        tensor = entry.make().float().reshape(entry.shape).contiguous()
        writer.write_tensor_data(_encode(tensor, kind))
    writer.close()
    return sum(sizes)


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
        yield from _tensors(model, {f"{name}.{n}": f"{path}.{p}" for n, p in tower.items()})
        for i in range(len(blocks)):
            here, there = f"{name}.blk.{i}", f"{path}.blocks.{i}"
            yield from _linears(model, BLOCK_LINEARS, here, there)
            yield from _norms(model, BLOCK_NORMS, here, there)
            if name == "vis.d":
                scales = {f"{here}.{n}": f"{there}.{p}" for n, p in BLOCK_SCALES.items()}
                yield from _tensors(model, scales)


def _decoder(model: VLA) -> Iterator[Entry]:
    table = model.decoder.embed_tokens.weight
    yield Entry(EMBEDDING, tuple(table.shape), lambda: _back(model, table.float()), matrix=True)
    for i in range(len(model.decoder.layers)):
        yield from _linears(model, LAYER_LINEARS, f"lm.blk.{i}", f"decoder.layers.{i}")
        yield from _norms(model, LAYER_NORMS, f"lm.blk.{i}", f"decoder.layers.{i}")


def _rest(model: VLA) -> Iterator[Entry]:
    yield from _linears(model, LINEARS)
    yield from _norms(model, NORMS)
    for i in range(cast(RegressionHeadConfig, model.config.head).depth):
        yield from _linears(model, {"lin": "fc"}, f"aex.head.blk.{i}", f"head.blocks.{i}")
        yield from _norms(model, {"ln": "norm"}, f"aex.head.blk.{i}", f"head.blocks.{i}")


def _linears(model: VLA, names: Mapping[str, str], here: str = "", there: str = "") -> Iterator[Entry]:
    for name, path in names.items():
        name, path = f"{here}.{name}".lstrip("."), f"{there}.{path}".lstrip(".")
        linear = cast(nn.Linear, model.get_submodule(path))
        shape = linear.out_features, linear.in_features
        yield Entry(f"{name}.weight", shape, partial(_weight, model, path), matrix=True)
        if linear.bias is not None:
            yield Entry(f"{name}.bias", shape[:1], partial(_bias, model, path), matrix=False)


def _norms(model: VLA, names: Mapping[str, str], here: str = "", there: str = "") -> Iterator[Entry]:
    for name, path in names.items():
        name, path = f"{here}.{name}".lstrip("."), f"{there}.{path}".lstrip(".")
        kinds = [kind for kind, _ in model.get_submodule(path).named_parameters()]
        yield from _tensors(model, {f"{name}.{kind}": f"{path}.{kind}" for kind in kinds})


def _tensors(model: VLA, names: Mapping[str, str]) -> Iterator[Entry]:
    for name, path in names.items():
        module, _, attribute = path.rpartition(".")
        tensor = cast(Tensor, getattr(model.get_submodule(module), attribute))
        yield Entry(name, tuple(tensor.shape), partial(torch.detach, tensor), matrix=False)


def _weight(model: VLA, path: str) -> Tensor:
    """The weight ``(out, in)`` of a linear, packed or not, as PyTorch's candidates have it."""
    weight, edge = dense_weight(cast(nn.Linear, model.get_submodule(path))), edges_of(model).get(path)
    if edge is None:
        return weight
    if edge.reads == "residual":
        return _back(model, weight)
    return _back(model, weight.T).T if edge.writes == "residual" else weight


def _bias(model: VLA, path: str) -> Tensor:
    bias, edge = cast(Tensor, model.get_submodule(path).bias).float(), edges_of(model).get(path)
    return _back(model, bias) if edge is not None and edge.writes == "residual" else bias


def _back(model: VLA, rows: Tensor) -> Tensor:
    """Rows ``(..., decoder width)`` in the basis that the residual stream has without a rotation."""
    norm = model.decoder.norm
    return norm.hadamard.inverse(rows) if isinstance(norm, RotatedNorm) else rows


def _encode(tensor: Tensor, kind: Type) -> np.ndarray:
    if kind == Type.BF16:  # many times as fast as the package's own
        return tensor.to(torch.bfloat16).view(torch.uint8).numpy()
    encoded: np.ndarray = gguf.quants.quantize(tensor.numpy(), kind)
    return encoded


def _nbytes(shape: tuple[int, ...], kind: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size
