"""The quantized linear: it stores packed integers, and multiplies integers."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sqap import kernels
from sqap.errors import InputError
from sqap.kernels.levels import dequantize_weight
from sqap.kernels.packing import pack_int4, packed_width, unpack_int4
from sqap.quantization.gptq import Factor, gptq
from sqap.quantization.grid import clip_scale, max_scale, round_to_grid, scale_shape
from sqap.quantization.rotation import HadamardLinear
from sqap.recipe import Scheme

_bound: WeakKeyDictionary[QuantizedLinear, tuple[tuple[object, ...], kernels.Linear]] = WeakKeyDictionary()


class QuantizedLinear(nn.Module):
    """A linear on integers: weights quantized once, activations as they come.

    The first of `sqap.kernels.BACKENDS` that fits multiplies. With scales per channel, token or tensor,
    levels are multiplied and added as exact integers. With scales per group, of weights or of activations,
    both are dequantized and multiplied in float32.

    Buffers: ``weight``, uint8 ``(out, in / 2)`` for 4 bits (`pack_int4`) or int8 ``(out, in)`` for 8;
    ``scale``, float32 whatever the model is cast to (`scale_shape`); ``bias``, ``(out,)`` or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    fuses = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
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
        self.weight_bits = scheme.weight_bits
        self.weight_granularity = scheme.weight_granularity
        self.group_size = scheme.group_size
        self.activation_bits = scheme.activation_bits
        self.activation_granularity = scheme.activation_granularity
        self.activation_group_size = scheme.activation_group_size
        self.activation_symmetric = scheme.activation_symmetric
        self.hadamard_block = hadamard_block
        whole = scheme.activation_granularity == "tensor"
        self.grids = kernels.Grids(
            scheme.weight_bits,
            scheme.activation_bits,
            scheme.activation_symmetric,
            group_size=0 if whole else scheme.activation_group_size or in_features,
            hadamard_block=hadamard_block or 1,
        )
        stored, scales = stored_shapes(in_features, out_features, scheme)
        dtype = torch.uint8 if self.weight_bits == 4 else torch.int8
        self.register_buffer("weight", torch.zeros(stored, dtype=dtype, device=device))
        self.register_buffer("scale", torch.zeros(scales, dtype=torch.float32, device=device))
        self.register_buffer("bias", bias)

    @classmethod
    def empty_like(cls, linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
        """The shapes, device and bias of ``linear``, with weights yet to be loaded."""
        return cls(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=None if linear.bias is None else linear.bias.detach().clone(),
            hadamard_block=linear.block if isinstance(linear, HadamardLinear) else 0,
            device=linear.weight.device,
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: Scheme, *, clip: bool = False, factor: Factor | None = None
    ) -> QuantizedLinear:
        """Round the weights of ``linear``; a `HadamardLinear` goes on rotating its input.

        Args:
            linear: finite weights of any floating type.
            scheme: the grids.
            clip: search the scales for the smallest squared error instead of covering the largest weight; an
                error counts by its input channel's importance, where a factor says it.
            factor: of the Hessian of what the weight is multiplied by: rounds by GPTQ instead of to nearest.

        Raises:
            InputError: the shape does not fit the scheme, or a weight is not finite.
        """
        quantized = cls.empty_like(linear, scheme)
        weight, bits = linear.weight.detach(), scheme.weight_bits
        grid = weight, bits, scheme.weight_granularity, scheme.group_size
        importance = None if factor is None else factor.importance
        scale = clip_scale(*grid, importance) if clip else max_scale(*grid)
        q = round_to_grid(weight, scale, bits) if factor is None else gptq(weight, scale, bits, factor)
        quantized.scale = scale
        quantized.weight = pack_int4(q) if bits == 4 else q
        return quantized

    def levels(self, rows: slice = slice(None)) -> Tensor:
        """The integers of the whole weight, or of some rows of it: ``(rows, in)``, int8."""
        return unpack_int4(self.weight[rows]) if self.weight_bits == 4 else self.weight[rows]

    def dequantized(self) -> Tensor:
        """The float32 weight ``(out, in)`` that the integers stand for."""
        return dequantize_weight(self.levels(), self.scale)

    def forward(
        self, input: Tensor, function: kernels.Function = "none", times: Tensor | None = None
    ) -> Tensor:
        """``function(input) * times`` ``(..., in)`` to ``(..., out)`` in the type of ``input``.

        Raises:
            InputError: the result would need a gradient.
        """
        if torch.is_grad_enabled() and (input.requires_grad or (times is not None and times.requires_grad)):
            raise InputError(
                "a quantized linear has no gradient, and its input needs one: run the model under "
                "torch.no_grad(), or on inputs and parameters that need none"
            )
        return self.bound()(input, function, times)

    @property
    def packed(self) -> kernels.Packed:
        """Its tensors, and what their integers mean."""
        return kernels.Packed(self.weight, self.scale, self.bias, self.grids)

    @property
    def backend(self) -> kernels.Backend:
        """What multiplies on the device that the weight is on."""
        return kernels.find(self.weight.device, self.grids)

    def bound(self) -> kernels.Linear:
        """The linear that the backend has made of this one, made anew when a tensor has been replaced."""
        weight, scale, bias, backend = self.weight, self.scale, self.bias, self.backend
        key = backend.name, *(0 if tensor is None else tensor.data_ptr() for tensor in (weight, scale, bias))
        found = _bound.get(self)
        if found is None or found[0] != key:
            found = key, backend.linear(self.packed)
            _bound[self] = found
        return found[1]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        grid = f"group {self.group_size}" if self.group_size else self.weight_granularity
        size = self.activation_group_size
        inputs = f"group {size}" if size else self.activation_granularity
        offset = "" if self.activation_symmetric else " with zero point"
        rotation = f", Hadamard {self.hadamard_block}" if self.hadamard_block else ""
        return (
            f"{self.in_features} -> {self.out_features}, W{self.weight_bits} per {grid}, "
            f"A{self.activation_bits} per {inputs}{offset}{rotation}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # .to(bfloat16) and .half() come through here, and would round the scales.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor is self.scale and moved.dtype != tensor.dtype else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def stored_shapes(
    in_features: int, out_features: int, scheme: Scheme
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of a quantized linear's ``weight`` and ``scale``.

    Raises:
        InputError: a group size does not divide ``in_features``, or 4-bit weights meet an odd one.
    """
    if scheme.activation_group_size is not None and in_features % scheme.activation_group_size:
        raise InputError(
            f"activation_group_size {scheme.activation_group_size} does not divide in_features {in_features}"
        )
    width = packed_width(in_features) if scheme.weight_bits == 4 else in_features
    granularity, size = scheme.weight_granularity, scheme.group_size
    return (out_features, width), scale_shape(out_features, in_features, granularity, size)
