"""Native products of packed low-bit weights with activations that are quantized on the way.

One extension holds a path for every kind of processor and picks the fastest that runs on this one. The
environment variable SQAP_KERNELS names another, or "reference" for PyTorch's arithmetic alone.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sqap.errors import InputError

try:
    _native: Any = import_module("sqap.kernels._native")
except ImportError:  # a source tree that was not installed
    _native = None

Function = Literal["none", "silu", "gelu", "gelu_tanh"]  # in the native code's order
REFERENCE = "reference"
VARIABLE = "SQAP_KERNELS"
NEEDS = {
    "avx512vnni": "AVX512-VNNI: Intel since Ice Lake, AMD since Zen 4",
    "avxvnni": "AVX-VNNI: Intel since Alder Lake, AMD since Zen 5",
    "avx2": "AVX2: nearly every x86 processor",
    "neon": "the dot products of ARMv8.2",
    "portable": "nothing",
    REFERENCE: "PyTorch",
}


@lru_cache(maxsize=1)
def paths() -> tuple[str, ...]:
    """The paths that run on this processor, the fastest first; "reference" is the last, and always there."""
    return (*(_native.paths() if _native else ()), REFERENCE)


@lru_cache(maxsize=1)
def chosen() -> str:
    """The path in use: the one that SQAP_KERNELS names, or the fastest.

    Raises:
        InputError: no such path runs here.
    """
    wanted = os.environ.get(VARIABLE) or paths()[0]
    if wanted not in paths():
        raise InputError(f"{VARIABLE} is {wanted!r}; on this processor it can be {', '.join(paths())}")
    return wanted


def describe() -> dict[str, Any]:
    """The processor, how many threads share the work, and every path: whether it runs here and is in use."""
    here, used = paths(), chosen()
    names = [*(_native.compiled() if _native else ()), REFERENCE]
    return {
        "processor": _processor(),
        "threads": _native.threads() if _native else torch.get_num_threads(),
        "built": _native is not None,
        "paths": [{"name": n, "needs": NEEDS[n], "runs": n in here, "used": n == used} for n in names],
    }


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    weight_bits: int,
    activation_bits: int,
    symmetric: bool,
    group_size: int,
    function: Function = "none",
    times: Tensor | None = None,
    hadamard_block: int = 1,
    path: str | None = None,
) -> Tensor:
    """``(..., in)`` to ``(..., out)`` in the type of ``x``, quantizing ``x`` on the way.

    What is quantized is ``function(x) * times``, behind `sqap.quantization.hadamard.block_hadamard`.

    Args:
        x: float32 or bfloat16.
        weight: as `sqap.quantization.QuantizedLinear` stores it, uint8 ``(out, in / 2)`` or int8
            ``(out, in)``.
        scale: float32 ``(out, groups)`` or ``(1, 1)``.
        bias: ``(out,)`` or None.
        weight_bits: 4 or 8.
        activation_bits: 4 or 8.
        symmetric: whether activations have no zero point.
        group_size: channels of an activation that share a scale; all of them for one per token, 0 for one
            for the whole tensor.
        function: applied to ``x``.
        times: what its results are multiplied by, of the shape and type of ``x``; or None.
        hadamard_block: the size of the Hadamard matrices, a power of two that divides ``in``; 1 for none.
        path: which one; the chosen one if not given.
    """
    k, n, (rows, groups) = x.shape[-1], len(weight), scale.shape
    tokens = x.reshape(-1, k).contiguous()
    _check(tokens, weight, weight_bits, (torch.float32, torch.bfloat16))
    if group_size and (k % group_size or (weight_bits == 4 and group_size % 2)):
        raise ValueError(f"{k} channels cannot be cut into groups of {group_size}")
    if scale.dtype != torch.float32 or not scale.is_contiguous() or k % groups or rows not in (1, n):
        raise ValueError(f"scales {tuple(scale.shape)} do not fit a weight of {n} by {k} channels")
    if bias is not None:
        bias = bias.float().contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    _native.linear(
        path or chosen(),
        tokens.data_ptr(),
        tokens.dtype == torch.bfloat16,
        len(tokens),
        k,
        activation_bits,
        symmetric,
        group_size,
        *_first(tokens, function, times, hadamard_block),
        weight.data_ptr(),
        weight_bits,
        n,
        scale.data_ptr(),
        groups,
        rows != n or scale.numel() == 1,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y


def quantize(
    x: Tensor,
    bits: int,
    symmetric: bool,
    group_size: int,
    function: Function = "none",
    times: Tensor | None = None,
    hadamard_block: int = 1,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels, scales and zero points of ``x`` ``(tokens, in)``, as `linear` makes them."""
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8)
    scale = torch.empty(m, k // group_size if group_size else 1)
    zero_point = None if symmetric else torch.empty(scale.shape, dtype=torch.int32)
    x = x.contiguous()
    grid = bits, symmetric, group_size, *_first(x, function, times, hadamard_block)
    arrays = q.data_ptr(), scale.data_ptr(), 0 if zero_point is None else zero_point.data_ptr()
    _native.quantize(path or chosen(), x.data_ptr(), x.dtype == torch.bfloat16, m, k, *grid, *arrays)
    return q, scale, zero_point


def matmul(q: Tensor, weight: Tensor, weight_bits: int, path: str | None = None) -> Tensor:
    """Exact products of int8 levels ``(tokens, in)`` with a packed weight: int32 ``(tokens, out)``."""
    _check(q, weight, weight_bits, (torch.int8,))
    (m, k), n = q.shape, len(weight)
    y = torch.empty(m, n, dtype=torch.int32)
    q = q.contiguous()
    _native.matmul(path or chosen(), q.data_ptr(), m, k, weight.data_ptr(), weight_bits, n, y.data_ptr())
    return y


def _first(x: Tensor, function: Function, times: Tensor | None, block: int) -> tuple[int, int, int]:
    """What is done to ``x`` before it is quantized, as the native code wants it."""
    if x.shape[1] % block or block & (block - 1):
        raise ValueError(f"a Hadamard block must be a power of two that divides {x.shape[1]}, got {block}")
    if times is not None and (
        times.numel() != x.numel() or times.dtype != x.dtype or not times.is_contiguous()
    ):
        raise ValueError(f"factors {tuple(times.shape)} do not fit activations {tuple(x.shape)}")
    return get_args(Function).index(function), 0 if times is None else times.data_ptr(), block


def _check(inputs: Tensor, weight: Tensor, weight_bits: int, types: tuple[torch.dtype, ...]) -> None:
    """The native code is given addresses, and believes what it is told about them."""
    channels = inputs.shape[1]
    if weight_bits == 4 and channels % 2:
        raise ValueError(f"channels of 4-bit weights come in pairs, got {channels}")
    width = channels // 2 if weight_bits == 4 else channels
    if weight.shape[1] != width or weight.element_size() != 1 or not weight.is_contiguous():
        raise ValueError(f"{channels} channels do not fit a weight stored as {tuple(weight.shape)}")
    if inputs.dtype not in types or not inputs.is_cpu or not weight.is_cpu:
        raise ValueError(f"inputs must be {' or '.join(map(str, types))} on the CPU, got {inputs.dtype}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
