"""What is said where there is no GPU, or an old one, and what `import sqap` leaves alone."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sqap.benchmark.candidates import Subject, check
from sqap.benchmark.shapes import random_policy
from sqap.cli import app
from sqap.errors import InputError
from sqap.kernels import Grids, Packed, find
from sqap.kernels.gpu.backend import GpuBackend, check_device
from sqap.kernels.gpu.describe import describe
from sqap.kernels.gpu.tiles import ESTIMATED, FEW, TABLE, choose
from sqap.policy import Policy
from sqap.recipe import Quantization, Recipe, Scheme

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
    with pytest.raises(InputError, match=r"^Card has compute capability 7\.5, and the kernels need 8\.0"):
        check_device(CUDA)
    monkeypatch.setenv("SQAP_KERNELS", "reference")
    check_device(CUDA)


def test_grids_without_a_kernel_are_refused_before_anything_moves(policy: Policy, card: Any) -> None:
    pytest.importorskip("triton", reason="Triton is there for Linux alone")
    card((8, 0))
    groups = Scheme(4, 4, activation_granularity="group", activation_group_size=16)
    grouped = random_policy(policy.config.model, Recipe(Quantization(groups)))
    with pytest.raises(InputError, match="activations with a scale per group of 16 channels have no kernel"):
        grouped.to("cuda")
    assert grouped.device.type == "cpu"
    assert grouped.model.device.type == "cpu"


def test_a_tile_is_chosen_by_size_and_card() -> None:
    """Few tokens, small results, others; a card that the table does not have takes the estimates, too."""
    for major in (*TABLE, 99):
        few, small, large = TABLE.get(major, ESTIMATED)
        assert choose(1, 11008, major) == choose(FEW, 64, major) == few
        assert choose(FEW + 1, 768, major) == small
        assert choose(280, 11008, major) == large


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


def test_inspect_says_what_runs_and_why(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = CliRunner().invoke(app, ["inspect", "--gpu"])
    assert found.exit_code == 0, found.output
    assert "there is no device 'cuda'" in " ".join(found.output.split())
    for capability, words in (((9, 0), "tiles are estimated"), ((7, 5), "kernels need 8.0")):
        card(capability)
        properties = SimpleNamespace(
            name="Card", major=capability[0], minor=capability[1], total_memory=1 << 30
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        (gpu,) = describe()["gpus"]
        assert gpu["backend"] == ("triton" if capability == (9, 0) else None)
        assert words in gpu["reason"]
        result = CliRunner().invoke(app, ["inspect", "--gpu"])
        assert result.exit_code == 0, result.output
        assert "Card" in result.output


def test_bench_says_that_there_is_no_gpu() -> None:
    found = CliRunner().invoke(app, ["bench", "--shape", "smolvla", "--device", "cuda:7", "--vs", ""])
    assert found.exit_code == 1
    assert "there is no device 'cuda:7'" in " ".join(found.output.split())
    with pytest.raises(InputError, match="a device is 'cpu', 'cuda' or 'cuda:NUMBER', got 'gpu'"):
        check(Subject("smolvla", Recipe.w4a8(), random=True, device="gpu"), [])
    with pytest.raises(InputError, match="torch-bf16-graph can be timed on cuda alone, not on 'cpu'"):
        check(Subject("smolvla", Recipe.w4a8(), random=True), ["torch-bf16-graph"])


def test_without_triton_a_linear_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Packed(torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 1), None, Grids(4, 8, True, 16))
    monkeypatch.setitem(sys.modules, "sqap.kernels.gpu.linear", None)
    with pytest.raises(InputError, match="the kernels for GPUs need Triton, which comes with PyTorch"):
        GpuBackend().linear(packed)


BEHIND_OSMESA = """
import ctypes, ctypes.util, sys
ctypes.CDLL(ctypes.util.find_library("OSMesa"), mode=ctypes.RTLD_GLOBAL)
from sqap.kernels.gpu.backend import load
flags = sys.getdlopenflags()
load()
import triton
print(triton.__name__, sys.getdlopenflags() == flags)
"""


@pytest.mark.skipif(ctypes.util.find_library("OSMesa") is None, reason="OSMesa is not installed")
def test_triton_is_imported_behind_osmesa() -> None:
    """Its calls would go to OSMesa's LLVM, and the process would end with a signal."""
    pytest.importorskip("triton", reason="Triton is there for Linux alone")
    found = subprocess.run([sys.executable, "-c", BEHIND_OSMESA], capture_output=True, text=True)
    assert found.stdout == "triton True\n", (found.returncode, found.stderr)
