"""Policies as GGUF files that vla.cpp reads: what its architectures share.

Names, keys and layouts are those of vla.cpp's architectures. What is multiplied with is stored in the type
asked for wherever vla.cpp's own quantizer would: not the embedding table, and no matrix whose rows blocks of
32 do not divide. Such matrices are bfloat16, everything else float32. vla.cpp rotates nothing as it runs, so
a rotated decoder is written in the basis that it had before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from sqap.benchmark.dense import dense_weight
from sqap.models import VLA
from sqap.models.edges import edges_of
from sqap.quantization import QuantizedEmbedding
from sqap.quantization.rotation import RotatedNorm

EMBEDDING = "token_embd.weight"

# Names of a decoder layer's tensors in vla.cpp, and in the layer.
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
        plain = self.name == EMBEDDING or (block > 1 and self.shape[-1] % block)
        return Type.BF16 if plain else wanted


class Contents(NamedTuple):
    """A file's: the architecture, the sizes that vla.cpp is told (without its name before them), tensors."""

    architecture: str
    keys: Mapping[str, int | float]
    entries: Sequence[Entry]


def write(contents: Contents, path: Path, precision: str) -> int:
    """Write a file, no more than one tensor of which is in memory at a time; bytes of its weights.

    Args:
        contents: packed weights are written as the floats they stand for, rounded to ``precision``.
        path: the file.
        precision: the type of matrices, in lower case.
    """
    architecture, keys, entries = contents
    kinds = [entry.kind(Type[precision.upper()]) for entry in entries]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.architecture", architecture)
    for name, value in keys.items():
        add: Any = writer.add_uint32
        if isinstance(value, float):
            add = writer.add_float64 if isinstance(value, np.float64) else writer.add_float32
        add(f"{architecture}.{name}", value)
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


def table(model: VLA) -> Entry:
    """The embedding table."""
    found = model.decoder.embed_tokens

    def rows() -> Tensor:
        wide = found.dequantized() if isinstance(found, QuantizedEmbedding) else found.weight.float()
        return _back(model, wide)

    return Entry(EMBEDDING, tuple(found.weight.shape), rows, matrix=True)


def linears(
    model: VLA, names: Mapping[str, str], here: str = "", there: str = "", *, matrix: bool = True
) -> Iterator[Entry]:
    """Weights, and biases where there are some, of linears; no ``matrix`` is stored as float32."""
    for name, path in names.items():
        name, path = f"{here}.{name}".lstrip("."), f"{there}.{path}".lstrip(".")
        linear = cast(nn.Linear, model.get_submodule(path))
        shape = linear.out_features, linear.in_features
        yield Entry(f"{name}.weight", shape, partial(weight, model, path), matrix)
        if linear.bias is not None:
            yield Entry(f"{name}.bias", shape[:1], partial(bias, model, path), matrix=False)


def norms(model: VLA, names: Mapping[str, str], here: str = "", there: str = "") -> Iterator[Entry]:
    """Weights, and biases where there are some, of norms."""
    for name, path in names.items():
        name, path = f"{here}.{name}".lstrip("."), f"{there}.{path}".lstrip(".")
        kinds = [kind for kind, _ in model.get_submodule(path).named_parameters()]
        yield from tensors(model, {f"{name}.{kind}": f"{path}.{kind}" for kind in kinds})


def tensors(model: VLA, names: Mapping[str, str]) -> Iterator[Entry]:
    """Parameters as they are, stored as float32."""
    for name, path in names.items():
        module, _, attribute = path.rpartition(".")
        tensor = cast(Tensor, getattr(model.get_submodule(module), attribute))
        yield Entry(name, tuple(tensor.shape), partial(torch.detach, tensor), matrix=False)


def weight(model: VLA, path: str) -> Tensor:
    """The weight ``(out, in)`` of a linear, packed or not, as PyTorch's candidates have it."""
    found, edge = dense_weight(cast(nn.Linear, model.get_submodule(path))), edges_of(model).get(path)
    if edge is None:
        return found
    if edge.reads == "residual":
        return _back(model, found)
    return _back(model, found.T).T if edge.writes == "residual" else found


def bias(model: VLA, path: str) -> Tensor:
    """The bias ``(out,)`` of a linear."""
    found, edge = cast(Tensor, model.get_submodule(path).bias).float(), edges_of(model).get(path)
    return _back(model, found) if edge is not None and edge.writes == "residual" else found


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
