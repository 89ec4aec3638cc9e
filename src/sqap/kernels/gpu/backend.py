"""The GPU backend: what it multiplies, and what it refuses in a sentence."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sqap.errors import InputError
from sqap.kernels.backend import Attention, FusedLayer, Grids, LayerSpec, Packed
from sqap.kernels.cpu import REFERENCE, VARIABLE

if TYPE_CHECKING:
    from sqap.kernels.gpu.layer import GpuLayer
    from sqap.kernels.gpu.linear import GpuLinear

OLDEST = 8, 0  # compute capability: the first with the int8 matrix instructions that Triton emits
LARGEST = 32768  # values of a token that one program holds in registers
logger = logging.getLogger("sqap")


class GpuBackend:
    """The `sqap.kernels.backend.Backend` of CUDA devices, unless SQAP_KERNELS names PyTorch's arithmetic."""

    name = "triton"

    def fits(self, device: torch.device, grids: Grids) -> bool:
        """Grids that have no kernel fit, too: `linear` refuses them, since the reference would be slow."""
        return device.type == "cuda" and not reference()

    def linear(self, packed: Packed) -> GpuLinear:
        """As `Backend.linear`.

        Raises:
            InputError: the device or the grids have no kernel, or Triton is not installed.
        """
        check_device(packed.weight.device)
        check_grids(packed)
        load()
        from sqap.kernels.gpu.linear import GpuLinear

        return GpuLinear(packed)

    def layer(self, spec: LayerSpec) -> GpuLayer | None:
        """None where linears of the same tokens quantize them differently."""
        from sqap.kernels.gpu.layer import GpuLayer

        for linears in (spec.inputs, spec.up):
            kinds = {cast("GpuLinear", linear).grids for linear in linears}
            if len(kinds) > 1:
                return None
        return GpuLayer(spec)

    def look(
        self, layers: Sequence[FusedLayer], x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor
    ) -> Tensor | None:
        if not all(layer.takes(x) for layer in layers):
            return None
        return torch.stack([cast("GpuLayer", layer).look(x, rope, rows) for layer in layers]).mean(0)

    def attention(self, device: torch.device, dtype: torch.dtype) -> Attention | None:
        return None


def reference() -> bool:
    """Whether SQAP_KERNELS asks for PyTorch's arithmetic."""
    return os.environ.get(VARIABLE) == REFERENCE


def load() -> None:
    """Import the kernels, and Triton with them.

    Raises:
        InputError: Triton is not installed.
    """
    try:
        with own_llvm():
            import sqap.kernels.gpu.linear  # noqa: F401
    except ImportError as problem:
        raise InputError(
            f"the kernels for GPUs need Triton, which comes with PyTorch for CUDA on Linux ({problem}): "
            f"install it, or set {VARIABLE}={REFERENCE} for PyTorch's slow arithmetic"
        ) from problem


@contextmanager
def own_llvm() -> Iterator[None]:
    """Let libraries that are loaded here call their own LLVM, whichever is there for all.

    OSMesa's is, once MuJoCo has drawn by it. Triton crashed as it was imported then, since its own calls went
    there.
    """
    flags = sys.getdlopenflags()
    if hasattr(ctypes.CDLL(None), "LLVMContextCreate"):
        sys.setdlopenflags(flags | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        yield
    finally:
        sys.setdlopenflags(flags)


def check_device(device: torch.device) -> None:
    """Make sure that a CUDA ``device`` is there, and new enough; other devices pass.

    Raises:
        InputError: it is not.
    """
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        built = "finds no NVIDIA GPU" if torch.version.cuda else "is built without CUDA"
        raise InputError(f"there is no device {str(device)!r}: this PyTorch {built}; use 'cpu'")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InputError(f"there is no device {str(device)!r}: the last GPU here is 'cuda:{count - 1}'")
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST and not reference():
        raise InputError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and the "
            f"kernels need {OLDEST[0]}.{OLDEST[1]}: use 'cpu', or {VARIABLE}={REFERENCE} for PyTorch's slow "
            "arithmetic"
        )


def check_grids(packed: Packed) -> None:
    """Make sure that there is a kernel for a linear.

    Raises:
        InputError: there is none.
        ValueError: the tensors do not fit together.
    """
    grids, (outputs, width) = packed.grids, packed.weight.shape
    inputs = 2 * width if grids.weight_bits == 4 else width
    if packed.scale.shape not in ((1, 1), (outputs, 1)) and packed.scale.shape[1] < 2:
        raise ValueError(
            f"scales {tuple(packed.scale.shape)} do not fit a weight of {outputs} by {inputs} channels"
        )
    wrong = None
    if packed.scale.shape[1] > 1:
        wrong = f"weights with a scale per group of {inputs // packed.scale.shape[1]} channels"
    elif grids.group_size == 0:
        wrong = "activations with one scale per tensor"
    elif grids.group_size != inputs:
        wrong = f"activations with a scale per group of {grids.group_size} channels"
    elif not grids.symmetric:
        wrong = "activations with a zero point"
    elif inputs > LARGEST:
        wrong = f"more than {LARGEST} input channels, here {inputs},"
    if wrong is not None:
        raise InputError(
            f"on GPUs, {wrong} have no kernel: compress with a scale per output channel and token, as the "
            f"recipe w4a8 does, or set {VARIABLE}={REFERENCE} for PyTorch's slow arithmetic"
        )
    if grids.activation_bits == 4:
        _say_that_four_bits_are_eight()


@lru_cache(maxsize=1)
def _say_that_four_bits_are_eight() -> None:
    logger.warning(
        "on GPUs, 4-bit activations are multiplied as 8-bit integers: W4A4 is no faster there than W4A8"
    )
