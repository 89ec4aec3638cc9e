"""What runs on the GPUs of this machine, and why, for people."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sqap.errors import InputError
from sqap.kernels.gpu.backend import GpuBackend, check_device, reference
from sqap.kernels.gpu.tiles import TABLE


def describe() -> dict[str, Any]:
    """Every GPU, what multiplies there, and what there is no GPU for.

    Returns:
        ``torch_cuda`` and ``triton``, releases or None; ``gpus``, for each its ``name``, ``capability``,
        ``memory_bytes``, the ``backend`` or None and the ``reason``.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "torch_cuda": torch.version.cuda,
        "triton": _triton(),
        "gpus": [_gpu(torch.device("cuda", i)) for i in range(count)],
        "reason": None if count else _refusal(torch.device("cuda")),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    reason = _refusal(device)
    backend = None if reason else GpuBackend.name
    if reason is None and reference():
        backend, reason = "reference", "SQAP_KERNELS asks for PyTorch's arithmetic, which is slow"
    elif reason is None and _triton() is None:
        backend, reason = None, "Triton is not installed; it comes with PyTorch for CUDA"
    elif reason is None:
        known = found.major in TABLE
        reason = "tiles are estimated, not measured" if known else "tiles are those of an older kind of card"
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "backend": backend,
        "reason": reason,
    }


def _refusal(device: torch.device) -> str | None:
    try:
        check_device(device)
    except InputError as problem:
        return str(problem)
    return None


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
