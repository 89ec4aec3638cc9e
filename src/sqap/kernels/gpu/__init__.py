"""Packed linears and whole transformer layers on NVIDIA GPUs, in Triton. Never run on silicon; docs/gpu.md.

Triton comes with PyTorch for CUDA. It is imported when the first linear is bound, never by ``import sqap``.
"""

from sqap.kernels.gpu.backend import GpuBackend

__all__ = ["GpuBackend"]
