"""Native products on CPUs.

One extension holds a path for every kind of processor and picks the fastest that runs here and computes what
plain C++ does (`check`). The environment variable SQAP_KERNELS names another, or "reference" for PyTorch's
arithmetic alone.
"""

from __future__ import annotations

import logging
import os
import platform
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.kernels.backend import FUNCTIONS, Function, Packed

try:
    _native: Any = import_module("sqap.kernels.cpu._native")
except ImportError:  # a source tree that was not installed
    _native = None

logger = logging.getLogger("sqap")

NATIVE = torch.float32, torch.bfloat16
PORTABLE, REFERENCE = "portable", "reference"
VARIABLE = "SQAP_KERNELS"
NEEDS = {
    "amx": "AMX-INT8 and AMX-BF16: Intel's servers since Sapphire Rapids",
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
    """The path in use: the one that SQAP_KERNELS names, or the fastest that passes its check.

    Raises:
        InputError: no such path runs here, or it computes something else than plain C++.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return _fastest()
    if wanted not in paths():
        raise InputError(f"{VARIABLE} is {wanted!r}; on this processor it can be {', '.join(paths())}")
    wrong = _difference(wanted)
    if wrong is not None:
        raise InputError(
            f"{VARIABLE} is {wanted!r}, whose results on this processor are wrong (first of all {wrong}); "
            f"without {VARIABLE}, the fastest path whose results are right is used"
        )
    return wanted


def _fastest() -> str:
    """The first path that passes its check; those before it are warned about."""
    wrong: list[str] = []
    for path in paths():
        found = _difference(path)
        if found is None:
            break
        wrong.append(f"{path!r} (first of all {found})")
    if wrong:
        logger.warning(
            "on this processor, the results of the kernels %s are wrong: %r is used instead",
            " and ".join(wrong),
            path,
        )
    return path


def describe() -> dict[str, Any]:
    """The processor, how many threads share the work, and every path.

    Of a path: whether it runs here, is in use and was checked against plain C++, and what differed, or None.
    """
    here, used, found = paths(), chosen(), []
    for name in (*(_native.compiled() if _native else ()), REFERENCE):
        checked = name in here and name not in (PORTABLE, REFERENCE)
        path = {"name": name, "needs": NEEDS[name], "runs": name in here, "used": name == used}
        found.append({**path, "checked": checked, "differs": _difference(name) if checked else None})
    return {
        "processor": processor(),
        "threads": _native.threads() if _native else torch.get_num_threads(),
        "built": _native is not None,
        "paths": found,
    }


def release_threads() -> None:
    """End the OpenMP threads that the calling thread has started; its next parallel loop starts them again.

    For a thread that hands the policy over to another one. While all teams of a process together have more
    threads than the processor has cores, libgomp lets waiting threads sleep at once instead of spinning, and
    the hundreds of short loops of a step take several times as long.
    """
    if _native is not None:
        _native.release_team()


def _difference(path: str) -> str | None:
    from sqap.kernels.cpu.check import difference  # which needs what is defined here

    found = difference(path)
    release_threads()  # whoever asks first, which may be a thread that does not act
    return found


class CpuLinear:
    """A packed weight, checked once and multiplied often.

    Args:
        packed: contiguous tensors on the CPU.
        path: which one; the chosen one if not given.

    Raises:
        ValueError: the tensors do not fit together.
    """

    def __init__(self, packed: Packed, path: str | None = None) -> None:
        weight, scale, bias, grids = packed.weight, packed.scale, packed.bias, packed.grids
        n, width = weight.shape
        k = 2 * width if grids.weight_bits == 4 else width
        rows, groups = scale.shape
        size, block = grids.group_size, grids.hadamard_block
        _check_weight(weight)
        if size and (k % size or (grids.weight_bits == 4 and size % 2)):
            raise ValueError(f"{k} channels cannot be cut into groups of {size}")
        if scale.dtype != torch.float32 or not scale.is_contiguous() or not scale.is_cpu:
            raise ValueError(f"scales must be contiguous float32 on the CPU, got {scale.dtype}")
        if scale.shape != (1, 1) and (rows != n or not groups or k % groups):
            raise ValueError(f"scales {tuple(scale.shape)} do not fit a weight of {n} by {k} channels")
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"a bias {tuple(bias.shape)} does not fit a weight of {n} by {k} channels")
        if k % block or block & (block - 1):
            raise ValueError(f"a Hadamard block must be a power of two that divides {k}, got {block}")
        self.in_features, self.out_features, self.path = k, n, path or chosen()
        self._grids = 1 if size == 0 else k // size
        self._symmetric = grids.symmetric
        bias = None if bias is None else bias.float().contiguous()
        self._kept = weight, scale, bias  # the native code has their addresses
        self.native = _native.Linear(
            self.path, array(weight), grids.weight_bits, n, k,
            array(scale), groups, scale.shape == (1, 1), array(bias),
            grids.activation_bits, grids.symmetric, size, block,
        )  # fmt: skip

    def __call__(self, x: Tensor, function: Function = "none", times: Tensor | None = None) -> Tensor:
        """``function(x) * times`` ``(..., in)`` to ``(..., out)``; other types go through float32."""
        if x.dtype not in NATIVE:
            return self(x.float(), function, None if times is None else times.float()).to(x.dtype)
        x, times = self._check(x, times)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        half, m = x.dtype == torch.bfloat16, x.numel() // self.in_features
        self.native(array(x), half, m, FUNCTIONS.index(function), array(times), array(y))
        return y

    def quantize(
        self, x: Tensor, function: Function = "none", times: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Levels, scales and zero points of ``x`` ``(tokens, in)``, as they are multiplied."""
        x, times = self._check(x, times)
        m, grids = len(x), (len(x), self._grids)
        q = torch.empty(m, self.in_features, dtype=torch.int8, device="cpu")
        scale = torch.empty(grids, dtype=torch.float32, device="cpu")
        zero_point = None if self._symmetric else torch.empty(grids, dtype=torch.int32, device="cpu")
        first = array(x), x.dtype == torch.bfloat16, m, FUNCTIONS.index(function), array(times)
        self.native.quantize(*first, array(q), array(scale), array(zero_point))
        return q, scale, zero_point

    def _check(self, x: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"inputs {tuple(x.shape)} do not fit a weight of {self.in_features} channels")
        if x.dtype not in NATIVE or not x.is_cpu:
            raise ValueError(f"inputs must be float32 or bfloat16 on the CPU, got {x.dtype} on {x.device}")
        if times is not None:
            if times.shape != x.shape or times.dtype != x.dtype:
                raise ValueError(f"factors {tuple(times.shape)} do not fit inputs {tuple(x.shape)}")
            times = times.contiguous()
        return x.contiguous(), times


def matmul(q: Tensor, weight: Tensor, weight_bits: int, path: str | None = None) -> Tensor:
    """Exact products of int8 levels ``(tokens, in)`` with a packed weight: int32 ``(tokens, out)``.

    Raises:
        ValueError: the tensors do not fit together.
    """
    (m, k), n = q.shape, len(weight)
    _check_weight(weight)
    if weight.shape[1] * (2 if weight_bits == 4 else 1) != k or q.dtype != torch.int8:
        raise ValueError(f"levels {tuple(q.shape)} do not fit a weight stored as {tuple(weight.shape)}")
    y = torch.empty(m, n, dtype=torch.int32, device="cpu")
    q = q.contiguous()
    _native.matmul(path or chosen(), array(q), m, k, array(weight), weight_bits, n, array(y))
    return y


def array(tensor: Tensor | None) -> tuple[int, int]:
    """What the native code is told of a contiguous tensor: its address and its bytes; zeros of none."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.nbytes)


def _check_weight(weight: Tensor) -> None:
    """The native code is given addresses, and believes what it is told about them."""
    if weight.element_size() != 1 or not weight.is_contiguous() or not weight.is_cpu:
        raise ValueError("a packed weight must be contiguous bytes on the CPU")


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
