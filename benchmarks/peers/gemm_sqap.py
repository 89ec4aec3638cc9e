"""sqap's products for gemm.py: `QuantizedLinear`, called as a model calls it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from gemm_serve import Array, Make, Product, Weight, serve, threads

from sqap.kernels.packing import pack_int4
from sqap.quantization import QuantizedLinear
from sqap.recipe import Scheme

W4A8 = Scheme()
GROUPS: dict[str, Any] = {"activation_granularity": "group", "activation_group_size": 32}
SCHEMES = {
    "w4a8": W4A8,
    "w4a8-g128": replace(W4A8, weight_granularity="group", group_size=128),
    "w4a4": replace(W4A8, activation_bits=4),
    "w4a4-a32": replace(W4A8, activation_bits=4, **GROUPS),
    "w8a8": replace(W4A8, weight_bits=8),
}
WIDER = 15  # a level of 8 bits is this many times one of 4 bits: -120..105


def make(scheme: Scheme) -> Make:
    def load(weight: Weight) -> Any:
        (n, k), levels, scale = weight.levels.shape, weight.levels, weight.scale
        if scheme.weight_bits == 8:
            levels, scale = levels * WIDER, scale / WIDER
        stored = torch.from_numpy(levels)
        linear = QuantizedLinear(k, n, scheme)
        linear.weight = pack_int4(stored) if scheme.weight_bits == 4 else stored
        linear.scale = torch.from_numpy(scale)[:, None].expand(linear.scale.shape).contiguous()
        return lambda x: bind(linear, x)

    return load


def bind(linear: QuantizedLinear, x: Array) -> Product:
    inputs = torch.from_numpy(x)
    return lambda: linear(inputs)


torch.set_num_threads(threads())
torch.set_grad_enabled(False)
serve({name: make(scheme) for name, scheme in SCHEMES.items()}, ("sqap", "torch"), lambda y: y.numpy())
