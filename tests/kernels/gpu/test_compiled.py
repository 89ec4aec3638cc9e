"""The Triton programs compiled for cards that are not here: what `offline.py` finds in their machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.once import once

pytest.importorskip("triton", reason="Triton is there for Linux alone")

SHARED = 99 << 10  # bytes that one program may have on sm_86, 89 and 120, the least among the cards
# Hopper multiplies tiles of 64 rows; on consumers' Blackwell and on Ampere a warp multiplies tiles of 16.
MATRIX = {80: "IMMA.16832.S8", 90: "IGMMA.64x", 120: "IMMA.16832.S8"}


@pytest.fixture(scope="session")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By capability, its programs; compiled once, which takes a minute."""

    def compile_all(place: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("offline.py")), *map(str, MATRIX)]
        fresh = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": f"{place}.triton"}
        done = subprocess.run(command, env=os.environ | fresh, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        place.write_text(done.stdout)

    found: dict[str, Any] = json.loads(once(tmp_path_factory, "machine-code", compile_all).read_text())
    return found


@pytest.fixture(params=MATRIX, ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, machine_code: dict[str, Any]) -> tuple[int, Any]:
    """A capability, and its programs."""
    return request.param, machine_code[str(request.param)]


def test_no_register_is_spilled_and_the_smallest_card_has_the_memory(compiled: tuple[int, Any]) -> None:
    for program in compiled[1]:
        assert program["spilled"] == program["LDL"] == program["STL"] == 0, program
        assert program["registers"] <= 255
        assert program["shared"] <= SHARED, program


def test_products_are_of_integers_and_loads_run_ahead(compiled: tuple[int, Any]) -> None:
    capability, programs = compiled
    products = [program for program in programs if program["program"] == "product"]
    assert len(products) == 5
    for program in products:
        assert all(name.startswith(MATRIX[capability]) for name in program["matrix"]), program
        assert program["matrix"]
        assert program["LDGSTS"] + program["UTMALDG"] > 0, program


def test_nibbles_are_unpacked_without_moving_bytes(compiled: tuple[int, Any]) -> None:
    """Two bitwise operations for four levels: PRMT only puts together what the epilogue writes."""
    _, programs = compiled
    products = [program for program in programs if program["program"] == "product"]
    for program in products:
        constants = program["constants"]
        if constants["BITS"] == 4:
            results = constants["BLOCK_M"] * constants["BLOCK_N"] // (32 * 4)
            assert program["PRMT"] <= results, program
