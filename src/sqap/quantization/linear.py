"""The quantized linear, which stores packed integers and multiplies integers, and the swap into a decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.models.vla import VLA
from sqap.quantization.grid import dequantize_weight, quantize_activation, quantize_weight, scale_shape
from sqap.quantization.packing import pack_int4, packed_width, unpack_int4
from sqap.quantization.rotation import (
    HadamardLinear,
    block_hadamard,
    is_rotated,
    prepare_rotated,
    rotate_decoder,
)
from sqap.recipe import Quantization

T = TypeVar("T")


class QuantizedLinear(nn.Module):
    """A linear on integers: weights quantized once, activations as they come.

    Buffers: ``weight``, uint8 ``(out, in / 2)`` for 4 bits (`pack_int4`) or int8 ``(out, in)`` for 8;
    ``scale``, float32 whatever the model is cast to (`scale_shape`); ``bias``, ``(out,)`` or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantization: Quantization,
        *,
        bias: Tensor | None = None,
        hadamard_block: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """All weights zero, to be loaded; ``hadamard_block`` 0 leaves the input unrotated.

        Raises:
            InputError: the group size does not divide ``in_features``, or 4-bit weights meet an odd one.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_bits = quantization.weight_bits
        self.weight_granularity = quantization.weight_granularity
        self.group_size = quantization.group_size
        self.activation_bits = quantization.activation_bits
        self.activation_granularity = quantization.activation_granularity
        self.hadamard_block = hadamard_block
        stored, scales = stored_shapes(in_features, out_features, quantization)
        dtype = torch.uint8 if self.weight_bits == 4 else torch.int8
        self.register_buffer("weight", torch.zeros(stored, dtype=dtype, device=device))
        self.register_buffer("scale", torch.zeros(scales, device=device))
        self.register_buffer("bias", bias)

    @classmethod
    def empty_like(cls, linear: nn.Linear, quantization: Quantization) -> QuantizedLinear:
        """The shapes, device and bias of ``linear``, with weights yet to be loaded."""
        return cls(
            linear.in_features,
            linear.out_features,
            quantization,
            bias=None if linear.bias is None else linear.bias.detach().clone(),
            hadamard_block=linear.block if isinstance(linear, HadamardLinear) else 0,
            device=linear.weight.device,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantization: Quantization) -> QuantizedLinear:
        """Round the weights of ``linear``; a `HadamardLinear` goes on rotating its input."""
        quantized = cls.empty_like(linear, quantization)
        q, quantized.scale = quantize_weight(
            linear.weight.detach(),
            quantization.weight_bits,
            quantization.weight_granularity,
            quantization.group_size,
        )
        quantized.weight = pack_int4(q) if quantization.weight_bits == 4 else q
        return quantized

    def levels(self) -> Tensor:
        """The weight's integers ``(out, in)``, int8."""
        return unpack_int4(self.weight) if self.weight_bits == 4 else self.weight

    def dequantized(self) -> Tensor:
        """The float32 weight ``(out, in)`` that the integers stand for."""
        return dequantize_weight(self.levels(), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)`` in the type of ``x``."""
        wide = x.float()
        if self.hadamard_block:
            wide = block_hadamard(wide, self.hadamard_block)
        q, scale = quantize_activation(wide, self.activation_bits, self.activation_granularity)
        if self.group_size is None:
            out = integer_matmul(q, self.levels()).mul_(scale).mul_(self.scale.T)
        else:
            out = F.linear(q.float(), self.dequantized()) * scale
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        grid = f"group {self.group_size}" if self.group_size else self.weight_granularity
        rotation = f", Hadamard {self.hadamard_block}" if self.hadamard_block else ""
        return (
            f"{self.in_features} -> {self.out_features}, W{self.weight_bits} per {grid}, "
            f"A{self.activation_bits} per {self.activation_granularity}{rotation}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # .to(bfloat16) and .half() come through here, and would round the scales.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor is self.scale and moved.dtype != tensor.dtype else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def integer_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """int8 ``(..., in)`` times int8 ``(out, in)``: the integers ``(..., out)``, as float32.

    Exact below 2**24, which is as far as float32 counts.
    """
    if q.device.type == "cpu" and _int8_matmul_is_exact():
        rows = torch._int_mm(q.reshape(-1, q.shape[-1]), weight.T)
        return rows.float().view(*q.shape[:-1], -1)
    return F.linear(q.float(), weight.float())


@lru_cache(maxsize=1)
def _int8_matmul_is_exact() -> bool:
    """Whether PyTorch's int8 product is worth using on this CPU: eight times as fast as float32, with VNNI.

    On x86 CPUs without VNNI oneDNN adds pairs of products in 16 bits, which saturate: wrong results, for
    the largest levels. On other CPUs it is a plain loop.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    largest = torch.full((16, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.T) == 64 * 127 * 127).all())


def stored_shapes(
    in_features: int, out_features: int, quantization: Quantization
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of a quantized linear's ``weight`` and ``scale``.

    Raises:
        InputError: the group size does not divide ``in_features``, or 4-bit weights meet an odd one.
    """
    width = packed_width(in_features) if quantization.weight_bits == 4 else in_features
    granularity, size = quantization.weight_granularity, quantization.group_size
    return (out_features, width), scale_shape(out_features, in_features, granularity, size)


def quantize_decoder(model: VLA, quantization: Quantization) -> None:
    """Replace every linear of the decoder by its quantized self, in place; rotate first if asked to.

    Raises:
        InputError: the model is already quantized, or is rotated although the recipe is not; a linear's
            shape does not fit the recipe (found before anything changes), or a weight is not finite.
    """
    _check(model, quantization)
    if is_rotated(model) and not quantization.rotate:
        raise InputError("the model is rotated, but the recipe says rotate = false")
    if quantization.rotate and not is_rotated(model):
        rotate_decoder(model)
    _replace_linears(model, lambda linear: QuantizedLinear.from_linear(linear, quantization))


def prepare_quantized(model: VLA, quantization: Quantization) -> None:
    """Give a fresh ``model`` the modules `quantize_decoder` would, with weights yet to be loaded.

    Raises:
        InputError: the model is already rotated or quantized, or a linear's shape does not fit the recipe.
    """
    _check(model, quantization)
    if quantization.rotate:
        prepare_rotated(model)
    _replace_linears(model, lambda linear: QuantizedLinear.empty_like(linear, quantization))


def _check(model: VLA, quantization: Quantization) -> None:
    if any(isinstance(module, QuantizedLinear) for module in model.decoder.modules()):
        raise InputError("the decoder is already quantized")
    _map_linears(model, lambda linear: stored_shapes(linear.in_features, linear.out_features, quantization))


def _replace_linears(model: VLA, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, replacement in _map_linears(model, make).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement)


def _map_linears(model: VLA, function: Callable[[nn.Linear], T]) -> dict[str, T]:
    """What ``function`` makes of each of the decoder's linears, by name; its errors get that name."""
    results = {}
    for name, module in model.decoder.named_modules(prefix="decoder"):
        if isinstance(module, nn.Linear):
            try:
                results[name] = function(module)
            except InputError as problem:
                raise InputError(f"{name} cannot be quantized: {problem}") from problem
    return results
