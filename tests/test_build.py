"""The build id changes with everything that may change numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sqap
from sqap import build
from sqap.kernels import cpu


def test_the_build_id_names_version_files_kernels_and_torch() -> None:
    assert build.build_id() == {
        "sqap": sqap.__version__,
        "package": build.package_hash(),
        "kernels": cpu.chosen(),
        "torch": torch.__version__,
    }


def test_the_kernels_in_use_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "chosen", lambda: "reference")
    assert build.build_id()["kernels"] == "reference"


def package(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / f"{name.replace('_', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_one_changed_renamed_or_added_file_makes_another_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {
        "same": {"a": "1", "b_c": "2"},
        "changed": {"a": "1", "b_c": "3"},
        "renamed": {"a": "1", "b_d": "2"},
        "added": {"a": "1", "b_c": "2", "e": ""},
        "moved": {"a": "12", "b_c": ""},
    }
    found = {}
    for name, files in packages.items():
        monkeypatch.setattr(build, "PACKAGE", package(tmp_path / name, **files))
        found[name] = build.package_hash.__wrapped__()
    assert len(set(found.values())) == len(packages)
    monkeypatch.setattr(build, "PACKAGE", package(tmp_path / "again", **packages["same"]))
    assert build.package_hash.__wrapped__() == found["same"]


@pytest.mark.skipif(cpu._native is None, reason="the native kernels are not built")
def test_another_native_extension_makes_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rebuilt:
        __file__ = str(tmp_path / "_native.so")

    Path(Rebuilt.__file__).write_bytes(b"other kernels")
    before = build.package_hash.__wrapped__()
    monkeypatch.setattr(cpu, "_native", Rebuilt)
    assert build.package_hash.__wrapped__() != before
