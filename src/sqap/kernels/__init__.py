"""Products of packed low-bit weights with activations that are quantized on the way: the backends."""

from __future__ import annotations

import torch

from sqap.kernels.backend import (
    FUNCTIONS,
    Attention,
    Backend,
    Function,
    Grids,
    LayerSpec,
    Linear,
    Norm,
    Packed,
)
from sqap.kernels.cpu.backend import CpuBackend
from sqap.kernels.gpu import GpuBackend
from sqap.kernels.reference import ReferenceBackend

# The first that fits multiplies. The last fits everything: it is what the others are checked against.
BACKENDS: list[Backend] = [CpuBackend(), GpuBackend(), ReferenceBackend()]


def find(device: torch.device, grids: Grids) -> Backend:
    """The backend that multiplies weights of such grids on that device."""
    return next(backend for backend in BACKENDS if backend.fits(device, grids))


def attention(device: torch.device, dtype: torch.dtype) -> Attention | None:
    """The first backend's attention on that device in that type; None if it is PyTorch's."""
    for backend in BACKENDS:
        found = backend.attention(device, dtype)
        if found is not None:
            return found
    return None


__all__ = [
    "BACKENDS",
    "FUNCTIONS",
    "Backend",
    "Function",
    "Grids",
    "LayerSpec",
    "Linear",
    "Norm",
    "Packed",
    "attention",
    "find",
]
