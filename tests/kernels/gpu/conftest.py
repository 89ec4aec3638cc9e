"""The GPU backend on the CPU, by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from sqap import kernels
from sqap.kernels import Grids
from sqap.kernels.gpu import GpuBackend


class Interpreted(GpuBackend):
    """Takes the CPU for a GPU."""

    def fits(self, device: torch.device, grids: Grids) -> bool:
        return device.type == "cpu"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    """The first of the backends."""
    pytest.importorskip("triton", reason="Triton is there for Linux alone")
    backend = Interpreted()
    monkeypatch.setattr(kernels, "BACKENDS", [backend, *kernels.BACKENDS])
    return backend
