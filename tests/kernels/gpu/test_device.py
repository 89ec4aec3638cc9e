"""What is said where there is no GPU, or an old one, and what `import sqap` leaves alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from sqap.errors import InputError
from sqap.kernels import Grids, find
from sqap.kernels.gpu.backend import check_device

CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``card((8, 6))``: one GPU of this compute capability."""

    def make(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return make


def test_no_gpu_is_one_sentence(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, words in ((None, "is built without CUDA"), ("12.8", "finds no NVIDIA GPU")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(InputError) as caught:
            policy.to("cuda")
        assert str(caught.value) == f"there is no device 'cuda': this PyTorch {words}; use 'cpu'"
    assert policy.device.type == "cpu"


def test_an_old_gpu_is_one_sentence(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card((7, 5))
    with pytest.raises(InputError, match=r"^Card has compute capability 7\.5, and the kernels need 8\.0: use"):
        check_device(CUDA)
    monkeypatch.setenv("SQAP_KERNELS", "reference")
    check_device(CUDA)


def test_other_gpus_and_devices_pass(card: Any) -> None:
    card((8, 0))
    for device in ("cuda", "cuda:0", "cpu", "meta"):
        check_device(torch.device(device))
    with pytest.raises(InputError, match="there is no device 'cuda:1': the last GPU here is 'cuda:0'"):
        check_device(torch.device("cuda:1"))


def test_gpus_are_multiplied_on_by_triton_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = Grids(4, 8, True, 64)
    assert find(CUDA, grids).name == "triton"
    assert find(torch.device("meta"), grids).name == "reference"
    monkeypatch.setenv("SQAP_KERNELS", "reference")
    assert find(CUDA, grids).name == "reference"


def test_importing_sqap_imports_no_triton() -> None:
    done = "import sys, sqap, sqap.policy, sqap.cli; print('triton' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", done], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
