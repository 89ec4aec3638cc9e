"""Compiles the programs for a GPU that is not there, and prints as JSON what their machine code has.

    TRITON_INTERPRET=0 python offline.py CAPABILITY [CAPABILITY ...]

A process of its own: Triton interprets programs or compiles them, whichever it was told when it was imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sqap.kernels.gpu import programs
from sqap.kernels.gpu.linear import CHUNK, warps
from sqap.kernels.gpu.tiles import TABLE, Tile

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = "N"  # output channels, of which every decoder has a multiple of 16
Arguments = dict[str, str]

PRODUCT: Arguments = {
    "x": "*i8", "x_scale": "*fp32", "weight": "*u8", "w_scale": "*fp32", "bias": "*fp32", "gain": "*fp32",
    "residual": "*bf16", "y": "*bf16", "M": "i32", "N": "i32",
}  # fmt: skip
NORM: Arguments = {
    "h": "*bf16", "gain": "*bf16", "shift": "*bf16", "x": "*i8", "x_scale": "*fp32", "eps": "fp32",
}  # fmt: skip
ACTIVATION: Arguments = {"h": "*bf16", "factor": "*bf16", "x": "*i8", "x_scale": "*fp32"}
HEADS = {"HEADS": 32, "KV_HEADS": 32, "HEAD": 128, "TURNED": 64, "BLOCK": 64}
STEPS = "first", "tokens", "angles", "q_row", "kv_row", "batch_step", "head_step", "token_step"
PLACE: Arguments = dict.fromkeys(("q", "k", "v", "cos", "sin", "keys", "values"), "*bf16") | dict.fromkeys(
    STEPS, "i32"
)


def build(
    name: str,
    arguments: Arguments,
    constants: dict[str, Any],
    capability: int,
    num_warps: int,
    stages: int = 1,
) -> dict[str, Any]:
    """One program for sm_``capability``, and what is in its machine code."""
    program = getattr(programs, name)
    names = program.arg_names
    aligned = [n for n, kind in arguments.items() if kind.startswith("*") or n == ALIGNED]
    source = ASTSource(
        program,
        {n: arguments.get(n, "constexpr") for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": num_warps, "num_stages": stages}
    made = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, sass = (_dump(flag, file.name) for flag in ("--dump-resource-usage", "-sass"))
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", usage)[1])
        for word in ("REG", "STACK", "LOCAL")  # type: ignore[index]
    )
    counted = {
        word: len(re.findall(rf"\b{word}\b", sass)) for word in ("LDGSTS", "UTMALDG", "PRMT", "LDL", "STL")
    }
    matrix = sorted(set(re.findall(r"\b(?:\w*MMA)[.\w]*", sass)))
    return {
        "program": name, "constants": constants, "registers": registers, "spilled": stack + local,
        "shared": made.metadata.shared, "matrix": matrix, **counted,
    }  # fmt: skip


def _dump(flag: str, path: str) -> str:
    return subprocess.run(
        [BINARIES / "cuobjdump", flag, path], capture_output=True, text=True, check=True
    ).stdout


def product(capability: int, tile: Tile, bits: int = 4, k: int = 4096) -> dict[str, Any]:
    flags = dict.fromkeys(("BIAS", "GAIN", "RESIDUAL", "ASSEMBLY"), True)
    sizes = {"BLOCK_M": tile.tokens, "BLOCK_N": tile.outputs, "BLOCK_K": tile.channels}
    arguments = PRODUCT if bits == 4 else PRODUCT | {"weight": "*i8"}
    constants = {"K": k, "BITS": bits, **flags, **sizes}
    return build("product", arguments, constants, capability, tile.warps, tile.stages)


def norm(capability: int, k: int, rms: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(k)
    flags = {"RMS": rms, "GAIN": True, "SHIFT": not rms, "BITS": 8, "SPLIT": True}
    return build("norm_quantize", NORM, {"K": k, **flags, "BLOCK": block}, capability, warps(k))


def activation(capability: int, k: int, function: int, factor: bool, block: int) -> dict[str, Any]:
    width = max(block, CHUNK)
    constants = {
        "K": k, "FUNCTION": function, "FACTOR": factor, "HADAMARD": block, "LOG": block.bit_length() - 1,
        "BITS": 8, "SPLIT": True, "CHUNKS": triton.next_power_of_2(triton.cdiv(k, width)), "BLOCK": width,
    }  # fmt: skip
    return build("activation_quantize", ACTIVATION, constants, capability, warps(k))


def compile_all(capability: int) -> list[dict[str, Any]]:
    """What is found in the programs for sm_``capability``."""
    tiles = TABLE[capability // 10]
    return [
        *(product(capability, tile) for tile in tiles),
        product(capability, tiles[2], bits=8),
        product(capability, tiles[2], k=4304),
        norm(capability, 4096, True),
        norm(capability, 1152, False),
        activation(capability, 11008, 1, True, 256),
        activation(capability, 4304, 2, False, 1),
        activation(capability, 2560, 1, True, 512),
        activation(capability, 28672, 0, False, 1),  # the widest: OpenVLA-OFT's head
        build("place", PLACE, HEADS, capability, 1),
    ]


if __name__ == "__main__":
    print(json.dumps({capability: compile_all(int(capability)) for capability in sys.argv[1:]}))
