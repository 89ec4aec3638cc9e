"""PyTorch's products for gemm.py, in the environment that sqap runs in."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from gemm_serve import Array, Bind, Product, Weight, saturates, serve, threads
from torch import Tensor

WIDER = 15  # a level of 8 bits is this many times one of 4 bits: -120..105
GROUP = 128


def floats(dtype: torch.dtype) -> Any:
    def load(weight: Weight) -> Bind:
        dense = torch.from_numpy(weight.dense()).to(dtype)

        def bind(x: Array) -> Product:
            inputs = torch.from_numpy(x).to(dtype)
            return lambda: F.linear(inputs, dense)

        return bind

    return load


def dynamic_int8(engine: str) -> Any:
    def load(weight: Weight) -> Bind:
        torch.backends.quantized.engine = engine
        n, k = weight.levels.shape
        quantized = torch.quantize_per_channel(
            torch.from_numpy(weight.dense()),
            torch.from_numpy(weight.scale / WIDER).double(),
            torch.zeros(n, dtype=torch.long),
            0,
            torch.qint8,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            linear = torch.ao.nn.quantized.dynamic.Linear(k, n, bias_=False)
            linear.set_weight_bias(quantized, None)

        def bind(x: Array) -> Product:
            inputs = torch.from_numpy(x)
            return lambda: linear(inputs)

        return bind

    return load


def onednn_static(weight: Weight) -> Bind:
    """The product alone, of an input that is quantized already, as torch.compile calls it."""
    levels = torch.from_numpy(weight.levels * WIDER)
    scale = torch.from_numpy(weight.scale / WIDER)
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    zero_point = 64 if saturates() else 128

    def bind(x: Array) -> Product:
        step = float(abs(x).max()) / (zero_point - 1)
        q = torch.from_numpy(x).div(step).round().add(zero_point).to(torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack(levels, list(x.shape))
        rest = packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        return lambda: torch.ops.onednn.qlinear_pointwise(q, step, zero_point, *rest)

    return bind


def int4pack(weight: Weight) -> Bind:
    """W4A16: 4-bit weights in groups, dequantized on the way, inputs in bfloat16."""
    n, k = weight.levels.shape
    levels = torch.from_numpy(weight.levels).int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2)
    scale = torch.from_numpy(weight.scale).expand(k // GROUP, n)
    grid = torch.stack([scale, torch.zeros_like(scale)], dim=2).bfloat16().contiguous()

    def bind(x: Array) -> Product:
        inputs = torch.from_numpy(x).bfloat16()
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, packed, GROUP, grid)

    return bind


def to_array(y: Tensor) -> Array:
    return y.float().numpy()


torch.set_num_threads(threads())
torch.set_grad_enabled(False)
serve(
    {
        "fp32": floats(torch.float32),
        "bf16": floats(torch.bfloat16),
        "int8-x86": dynamic_int8("x86"),
        "int8-onednn": dynamic_int8("onednn"),
        "int8-static": onednn_static,
        "int4pack": int4pack,
    },
    ("torch",),
    to_array,
)
