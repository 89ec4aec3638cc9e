"""The same check of every path in C++ alone: under sanitizers, and on ARM in an emulator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sqap.kernels import cpu

ROOT = Path(__file__).parents[2]
CMAKE = [sys.executable, "-m", "cmake"]
ARM = "aarch64-linux-gnu-g++"


def build(directory: Path, *options: str) -> Path:
    configure = [*CMAKE, "-S", ROOT, "-B", directory, "-DSQAP_CHECK=ON", *options]
    for command in (configure, [*CMAKE, "--build", directory, "--parallel", "2"]):
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
    return directory / "check"


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    check = build(tmp_path, "-DSQAP_SANITIZE=ON")
    found = subprocess.run([check], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.split() == [path for path in cpu.paths() if path != cpu.REFERENCE]


@pytest.mark.skipif(
    not (shutil.which(ARM) and shutil.which("qemu-aarch64")), reason="needs g++-aarch64-linux-gnu, qemu-user"
)
def test_arm_computes_the_same(tmp_path: Path) -> None:
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    check = build(tmp_path, *options, f"-DCMAKE_CXX_COMPILER={ARM}", "-DCMAKE_EXE_LINKER_FLAGS=-static")
    found = subprocess.run(["qemu-aarch64", check], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert found.stdout.split() == ["neon", "portable"]


def test_without_a_compiler_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    command = [*CMAKE, "-S", ROOT, "-B", tmp_path, "-DCMAKE_CXX_COMPILER=NOTFOUND"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode != 0
    assert "apt-get install g++" in " ".join(found.stderr.split())
