"""What is really quantized: every linear of a policy as it is stored, and a check against the recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, cast

import torch
from torch import nn

from sqap.errors import CheckpointError
from sqap.kernels.hadamard import largest_block
from sqap.models.edges import edges_of
from sqap.models.storage import STORAGE_DTYPE, stored_bytes
from sqap.models.vla import VLA
from sqap.quantization.embedding import QuantizedEmbedding, quantizes_table
from sqap.quantization.linear import QuantizedLinear, stored_shapes
from sqap.quantization.rotation import HadamardLinear, is_rotated
from sqap.recipe import Quantization, Scheme

Part = Literal["vision", "projector", "proprio", "decoder", "head"]
FLOAT_BITS = 8 * STORAGE_DTYPE.itemsize
SETTINGS = tuple(setting.name for setting in fields(Scheme))
# Where the rotated inputs of a rotated decoder's linears come from.
ROTATIONS: dict[str | None, Literal["residual", "heads", "online"]] = {
    "residual": "residual",
    "mixed": "heads",
    "inner": "online",
}


@dataclass(frozen=True)
class LinearReport:
    """One linear as it is stored.

    Args:
        name: its path in the model, as ``decoder.layers.0.self_attn.q_proj``.
        part: which of the policy's parts it belongs to.
        in_features: input channels.
        out_features: output channels.
        weight_bits: bits per weight, scales not counted.
        activation_bits: bits of the inputs that are multiplied; those of the weight for floats.
        granularity: what shares a weight scale: "channel", "group" or "tensor"; None for floats.
        group_size: input channels per scale, with granularity "group".
        activation_symmetric: whether activations have no zero point.
        rotation: where its rotated input comes from: "residual" and "heads" cost nothing at run time,
            "online" is a Hadamard product before the linear; None is not rotated.
        hadamard_block: size of the online product's blocks; 0 is none.
        bytes: of weight, scales and bias as stored.
        quantized: whether the weight is stored as integers.
    """

    name: str
    part: Part
    in_features: int
    out_features: int
    weight_bits: int
    activation_bits: int
    granularity: str | None
    group_size: int | None
    activation_symmetric: bool
    rotation: Literal["residual", "heads", "online"] | None
    hadamard_block: int
    bytes: int
    quantized: bool


def list_linears(model: VLA) -> list[LinearReport]:
    """Every linear of the model, in the order of its modules; convolutions and tables are none."""
    edges = edges_of(model.decoder) if is_rotated(model) else {}
    rotations = {f"decoder.{name}": ROTATIONS[edge.reads] for name, edge in edges.items()}
    return [
        _report(name, module, rotations.get(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
    ]


def count_parameters(module: nn.Module) -> int:
    """Weights and biases of a part, whether they are floats or packed; scales are not counted."""
    count = sum(parameter.numel() for parameter in module.parameters())
    for packed in module.modules():
        if isinstance(packed, QuantizedEmbedding):
            count += packed.weight.numel()
        elif isinstance(packed, QuantizedLinear):
            count += packed.in_features * packed.out_features
            count += 0 if packed.bias is None else packed.out_features
    return count


def check_coverage(model: VLA, quantization: Quantization) -> None:
    """Make sure that the model is what the recipe says: every linear packed on its grid, or float.

    Raises:
        CheckpointError: it is not; the message names the first linear that differs.
    """
    if is_rotated(model) != quantization.rotate:
        state = "rotated" if is_rotated(model) else "not rotated"
        raise CheckpointError(f"the recipe says rotate = {quantization.rotate}, but the decoder is {state}")
    if quantizes_table(model.config.decoder, quantization) != isinstance(
        model.decoder.embed_tokens, QuantizedEmbedding
    ):
        raise CheckpointError(
            f"the embedding table is not stored as the recipe's embedding_bits = "
            f"{quantization.embedding_bits} says"
        )
    edges = edges_of(model.decoder) if quantization.rotate else {}
    online = {f"decoder.{name}" for name, edge in edges.items() if edge.reads == "inner"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            scheme = quantization.scheme(name, name in model.sensitive)
            _check_linear(name, module, scheme, name in online)


def _check_linear(
    name: str, linear: nn.Linear | QuantizedLinear, scheme: Scheme | None, online: bool
) -> None:
    if isinstance(linear, nn.Linear):
        if scheme is not None:
            raise CheckpointError(f"{name} is not quantized, but the recipe wants {scheme.weight_bits} bits")
        return
    if scheme is None:
        raise CheckpointError(f"{name} is quantized, but the recipe leaves it in bfloat16")
    for setting in SETTINGS:
        found, expected = getattr(linear, setting), getattr(scheme, setting)
        if found != expected:
            raise CheckpointError(f"{name} has {setting} = {found}, the recipe says {expected}")
    block = largest_block(linear.in_features) if online else 0
    if linear.hadamard_block != block:
        raise CheckpointError(
            f"{name} rotates its input in blocks of {linear.hadamard_block}, the recipe needs {block}"
        )
    dtype = torch.uint8 if scheme.weight_bits == 4 else torch.int8
    shapes = stored_shapes(linear.in_features, linear.out_features, scheme)
    if linear.weight.dtype != dtype or (linear.weight.shape, linear.scale.shape) != shapes:
        found = f"{linear.weight.dtype} {tuple(linear.weight.shape)}"
        raise CheckpointError(f"{name} stores its weight as {found}, not packed as {dtype} {shapes[0]}")
    if linear.scale.dtype != torch.float32 or not linear.scale.isfinite().all():
        raise CheckpointError(f"{name} must have finite float32 scales")


def _report(
    name: str,
    linear: nn.Linear | QuantizedLinear,
    rotation: Literal["residual", "heads", "online"] | None,
) -> LinearReport:
    part = cast(Part, name.partition(".")[0])
    shape = linear.in_features, linear.out_features
    if isinstance(linear, QuantizedLinear):
        return LinearReport(
            name,
            part,
            *shape,
            weight_bits=linear.weight_bits,
            activation_bits=linear.activation_bits,
            granularity=linear.weight_granularity,
            group_size=linear.group_size,
            activation_symmetric=linear.activation_symmetric,
            rotation=rotation,
            hadamard_block=linear.hadamard_block,
            bytes=stored_bytes(linear),
            quantized=True,
        )
    return LinearReport(
        name,
        part,
        *shape,
        weight_bits=FLOAT_BITS,
        activation_bits=FLOAT_BITS,
        granularity=None,
        group_size=None,
        activation_symmetric=True,
        rotation=rotation,
        hadamard_block=linear.block if isinstance(linear, HadamardLinear) else 0,
        bytes=stored_bytes(linear),
        quantized=False,
    )
