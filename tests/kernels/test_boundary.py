"""The native code at its edges: what it is told of arrays, what lies behind them, memory and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sqap.kernels import Grids, Packed, cpu

PATHS = [path for path in cpu.paths() if path != cpu.REFERENCE]
ROOT = Path(__file__).parents[2]
every_path = pytest.mark.parametrize("path", PATHS)

# Runs a program for every path in a process of its own. They are forked: importing PyTorch takes two seconds.
FORK = """
import os, sys, traceback
import torch
from sqap.kernels import cpu

program, *paths = sys.argv[1:]
for path in paths:
    child = os.fork()
    if child == 0:
        try:
            exec(compile(program, "program", "exec"), {"path": path})
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(path, "ended with", status, flush=True)
"""


def run_every_path(program: str, printed: str) -> None:
    """Make sure that ``program`` ends and prints these lines for every path."""
    command = [sys.executable, "-c", FORK, program, *PATHS]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "".join(f"{printed}{path} ended with 0\n" for path in PATHS), found.stderr


GUARDED = """
from dataclasses import replace

import torch
from sqap.kernels import cpu
from sqap.kernels.backend import Grids, LayerSpec, Norm, Packed
from sqap.kernels.cpu.layer import CpuLayer, look
from tests.kernels.guarded import guarded


def check_layer(rms):
    # Of a decoder, or of an encoder: every tensor ends before such a page.
    def linear(inputs, outputs):
        weight = guarded(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8))
        scale, bias = guarded(torch.ones(outputs, 1)), guarded(torch.ones(outputs))
        return cpu.CpuLinear(Packed(weight, scale, bias, Grids(8, 8, True, inputs)), path)

    batch, tokens, width, hidden, heads, kv_heads, dim = 2, 13, 24, 40, 3, 1, 8
    keys = heads if not rms else kv_heads
    sizes = [heads * dim, keys * dim, keys * dim] if rms else [3 * heads * dim]
    one = guarded(torch.ones(width))
    norm = Norm(one, None if rms else one, 1e-5, rms)
    spec = LayerSpec(inputs=[linear(width, size) for size in sizes], out=linear(heads * dim, width),
                     up=[linear(width, hidden)] * (1 + rms), down=linear(hidden, width), norms=(norm, norm),
                     gains=(None, None) if rms else (one, one), function="silu", heads=(heads, keys, dim),
                     causal=rms)
    layer = CpuLayer(spec)
    rope = [guarded(torch.ones(batch, tokens, dim)) for _ in range(2)]
    kept = [guarded(torch.ones(batch, keys, tokens, dim)) for _ in range(2)]
    layer(guarded(torch.randn(batch, tokens, width)), rope, torch.tensor([0, tokens - 1]), kept)
    layer(guarded(torch.randn(batch, 45, width)))
    if rms:
        one_rope = [guarded(part[:1]) for part in rope]
        look([layer, layer], guarded(torch.randn(1, tokens, width)), one_rope, torch.tensor([tokens - 2]))
        keys = [guarded(torch.ones(batch, kv_heads, 21, dim)) for _ in range(2)]
        for one in (layer, CpuLayer(replace(spec, inputs=spec.inputs[:1], causal=False, cross=True))):
            prefix = one.prefix(*keys, tokens)
            one(guarded(torch.randn(batch, tokens, width)), rope, prefix=prefix)


for rms in (False, True):
    check_layer(rms)
for bits in (4, 8):
    for tokens, inputs, outputs in ((1, 34, 5), (3, 130, 16), (40, 98, 33), (15, 1026, 9)):
        shape = outputs, inputs // (2 if bits == 4 else 1)
        weight = guarded(torch.randint(0, 256, shape, dtype=torch.uint8))
        x = guarded(torch.randn(tokens, inputs))
        q = guarded(torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8))
        scale, bias = guarded(torch.ones(outputs, 1)), guarded(torch.ones(outputs))
        cpu.matmul(q, weight, bits, path)
        for symmetric in (True, False):
            for size in (inputs, 2, 0):
                grids = Grids(bits, 8, symmetric, size, hadamard_block=2)
                linear = cpu.CpuLinear(Packed(weight, scale, bias, grids), path)
                linear(x)
                linear(x, "silu", x)
print("done")
"""


def test_nothing_is_read_beyond_an_array() -> None:
    run_every_path(GUARDED, "done\n")


ADDRESS, HALF = 4096, False  # nothing is read there: sizes are looked at first


def native_linear(path: str, **changed: Any) -> Any:
    """Four-bit weights of 64 to 3 channels in two groups, with these of its arguments changed."""
    given: dict[str, Any] = {
        "weight": (ADDRESS, 96), "weight_bits": 4, "n": 3, "k": 64, "scale": (ADDRESS, 24), "groups": 2,
        "shared": False, "bias": (ADDRESS, 12), "bits": 8, "symmetric": False, "group": 64, "hadamard": 1,
    }  # fmt: skip
    assert changed.keys() <= given.keys()
    return cpu._native.Linear(path, *{**given, **changed}.values())


@every_path
def test_the_native_code_believes_no_size(path: str) -> None:
    for changed, sentence in (
        ({"weight": (ADDRESS, 95)}, "a weight: 95 bytes where 96 are needed"),
        ({"weight": (0, 0)}, "a weight: no bytes where 96 are needed"),
        ({"scale": (ADDRESS, 20)}, "a weight's scales: 20 bytes where 24 are needed"),
        ({"shared": True}, "a weight's scale: 24 bytes where 4 are needed"),
        ({"bias": (ADDRESS, 16)}, "a bias: 16 bytes where 12 are needed"),
        ({"weight_bits": 5}, "a weight has 4 or 8 bits"),
        ({"k": 63}, "an even number of input channels"),
        ({"k": 2**62, "n": 2**62}, "too large"),
        ({"n": -3}, "negative"),
        ({"groups": 3}, "do not divide its input channels"),
        ({"group": 48}, "do not divide its channels"),
        ({"bits": 2}, "an activation has 4 or 8 bits"),
        ({"hadamard": 3}, "a power of two"),
    ):
        with pytest.raises(ValueError, match=sentence):
            native_linear(path, **changed)
    linear = native_linear(path)
    x, y, none = (ADDRESS, 512), (ADDRESS, 24), (0, 0)  # two tokens
    for arguments, sentence in (
        (((ADDRESS, 508), HALF, 2, 0, none, y), "inputs: 508 bytes where 512"),
        ((x, HALF, 2, 0, (ADDRESS, 256), y), "factors: 256 bytes where 512"),
        ((x, HALF, 2, 0, none, (ADDRESS, 12)), "outputs: 12 bytes where 24"),
        ((x, HALF, 2, 4, none, y), "no such function"),
        ((x, HALF, -2, 0, none, y), "negative"),
        (((ADDRESS, 0), HALF, 2**56, 0, none, y), "too large"),  # 2**64 bytes, which 64 bits count as none
    ):
        with pytest.raises(ValueError, match=sentence):
            linear(*arguments)
    first, q, grids = (x, HALF, 2, 0, none), (ADDRESS, 128), (ADDRESS, 8)
    for rest, sentence in (
        (((ADDRESS, 127), grids, grids), "levels: 127 bytes where 128"),
        ((q, (ADDRESS, 4), grids), "scales: 4 bytes where 8"),
        ((q, grids, none), "zero points: no bytes where 8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            linear.quantize(*first, *rest)
    with pytest.raises(ValueError, match="products: 8 bytes where 24"):
        cpu._native.matmul(path, (ADDRESS, 128), 2, 64, (ADDRESS, 96), 4, 3, (ADDRESS, 8))


def native_layer(path: str, fused: bool = False, **changed: Any) -> Any:
    """Of width 64, with four query heads of 16 and two of keys, with these of its arrays changed."""

    def linear(outputs: int) -> Any:
        sizes = {"weight": (ADDRESS, 64 * outputs), "n": outputs, "scale": (ADDRESS, 4 * outputs)}
        return native_linear(path, **sizes, weight_bits=8, groups=1, bias=(0, 0))

    arrays = ("weight1", "bias1", "weight2", "bias2", "gain1", "gain2")
    given: dict[str, Any] = dict.fromkeys(arrays, (ADDRESS, 256)) | changed
    norms = [cpu._native.norm(False, given[f"weight{i}"], given[f"bias{i}"], 1e-5) for i in (1, 2)]
    inputs = [linear(128)] if fused else [linear(64), linear(32), linear(32)]
    rest = linear(64), [linear(64)], linear(64), *norms, given["gain1"], given["gain2"]
    return cpu._native.Layer(inputs, *rest, 0, 4, 2, 16, True, False)


# What a layer is given for two times three tokens, and what looking at layers is for three.
LAYER: dict[str, Any] = {
    "x": (ADDRESS, 1536), "y": (ADDRESS, 1536), "batch": 2, "tokens": 3, "cos": (ADDRESS, 384),
    "sin": (ADDRESS, 384), "rows": (ADDRESS, 3), "received": (ADDRESS, 24), "keys": (ADDRESS, 768),
    "values": (ADDRESS, 768), "first": 0, "prefix": None,
}  # fmt: skip
LOOK: dict[str, Any] = {
    "x": (ADDRESS, 768), "tokens": 3, "cos": (ADDRESS, 192), "sin": (ADDRESS, 192), "rows": (ADDRESS, 3),
    "received": (ADDRESS, 12),
}  # fmt: skip


@every_path
def test_the_native_code_believes_no_size_of_a_layer(path: str) -> None:
    for kind, called in (("weight", "a norm's weight"), ("bias", "a norm's bias"), ("gain", "a gain")):
        for name in (f"{kind}1", f"{kind}2"):
            with pytest.raises(ValueError, match=f"{called}: 252 bytes where 256"):
                native_layer(path, **{name: (ADDRESS, 252)})
    layer, none = native_layer(path), (0, 0)
    for changed, sentence in (
        ({"x": (ADDRESS, 1532)}, "inputs: 1532 bytes where 1536"),
        ({"y": (ADDRESS, 1532)}, "outputs: 1532 bytes where 1536"),
        ({"cos": (ADDRESS, 192)}, "cosines: 192 bytes where 384"),
        ({"sin": (ADDRESS, 192)}, "sines: 192 bytes where 384"),
        ({"sin": none}, "cosines without sines"),
        ({"cos": none}, "sines without cosines"),
        ({"rows": (ADDRESS, 2)}, "rows: 2 bytes where 3"),
        ({"received": (ADDRESS, 12)}, "what rows attend to: 12 bytes where 24"),
        ({"received": none}, "what rows attend to: no bytes where 24"),
        ({"keys": (ADDRESS, 384)}, "keys: 384 bytes where 768"),
        ({"values": (ADDRESS, 384)}, "values: 384 bytes where 768"),
        ({"keys": none}, "values without keys"),
        ({"values": none}, "keys without values"),
        ({"first": 4}, "the first token that is wanted is none of them"),
        ({"first": -1}, "the first token that is wanted is none of them"),
        ({"first": 1}, "a part of the tokens is wanted of one observation"),
        ({"batch": -2}, "negative"),
        ({"tokens": 2**60}, "too large"),
    ):
        with pytest.raises(ValueError, match=sentence):
            layer(*{**LAYER, **changed}.values())


@every_path
def test_the_native_code_believes_no_size_of_a_prefix(path: str) -> None:
    layer, block = native_layer(path), cpu._native.block(7, 16)
    given: dict[str, Any] = {
        "keys": (ADDRESS, 1280), "values": (ADDRESS, 1280), "batch": 2, "length": 5, "room": 2,
        "tiles": (ADDRESS, 32 * block),
    }  # fmt: skip
    for changed, sentence in (
        ({"keys": (ADDRESS, 1276)}, "a prefix's keys: 1276 bytes where 1280"),
        ({"values": (0, 0)}, "a prefix's values: no bytes where 1280"),
        ({"tiles": (ADDRESS, 16 * block)}, "tiles: "),
        ({"room": 2**40}, "too long"),
        ({"room": -1}, "at least one token"),
        ({"length": 0}, "at least one token"),
        ({"length": 2**60}, "too large"),
        ({"batch": 0}, "at least one token"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cpu._native.pack(layer, *{**given, **changed}.values())


@every_path
def test_the_native_code_believes_no_size_of_what_is_looked_at(path: str) -> None:
    layer, none = native_layer(path), (0, 0)
    for changed, sentence in (
        ({"x": (ADDRESS, 764)}, "inputs: 764 bytes where 768"),
        ({"cos": (ADDRESS, 188)}, "cosines: 188 bytes where 192"),
        ({"sin": (ADDRESS, 188)}, "sines: 188 bytes where 192"),
        ({"sin": none}, "sines: no bytes where 192"),
        ({"rows": (ADDRESS, 2)}, "rows: 2 bytes where 3"),
        ({"received": (ADDRESS, 8)}, "what rows attend to: 8 bytes where 12"),
        ({"tokens": -3}, "negative"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cpu._native.look([layer, layer], *{**LOOK, **changed}.values())
    for layers, sentence in (
        ([], "no layers to look at"),
        ([layer, native_layer(path, fused=True)], "queries and keys of their own"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cpu._native.look(layers, *LOOK.values())


OUT_OF_MEMORY = """
import resource
import torch
from sqap.kernels import FUNCTIONS, Grids, Packed, cpu

torch.set_num_threads(2)
channels = 1 << 22
weight = torch.zeros(1, channels, dtype=torch.int8)

def bound(weight):
    grids = Grids(8, 8, True, weight.shape[1])
    return cpu.CpuLinear(Packed(weight, torch.ones(1, 1), None, grids), path)

linear, few = bound(weight), bound(weight[:, :8].contiguous())
few(torch.ones(100, 8), "silu")  # the threads are there, and their stacks
x, q, scale = torch.ones(2, channels), torch.empty(2, channels, dtype=torch.int8), torch.empty(2, 1)
first = cpu.array(x), False, 2, FUNCTIONS.index("silu"), (0, 0)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
for limit in (used + (12 << 20), resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        # Each of two threads wants 16 MiB for a token.
        linear.native.quantize(*first, cpu.array(q), cpu.array(scale), (0, 0))
        print("done")
    except MemoryError:
        print("MemoryError")
print(int(q.sum()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited as Linux does it")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="on one core the second thread may get nothing to do")
def test_a_thread_that_gets_no_memory_raises_where_it_was_called() -> None:
    run_every_path(OUT_OF_MEMORY, f"MemoryError\ndone\n{2 * 127 << 22}\n")


def test_a_new_thread_uses_as_many_threads_as_pytorch_was_told() -> None:
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        thread = threading.Thread(target=lambda: found.append(cpu._native.threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [3]


def bound(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *last: int
) -> cpu.CpuLinear:
    """Of 4-bit weights; ``last`` is the group size and the Hadamard block."""
    return cpu.CpuLinear(Packed(weight, scale, bias, Grids(4, 8, True, *(last or (64,)))))


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, weight = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(3, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not fit a weight stored"):
        cpu.matmul(q, weight, 8)
    with pytest.raises(ValueError, match="contiguous bytes"):
        cpu.matmul(q[:, :62], weight[:, :31], 4)
    with pytest.raises(ValueError, match=r"scales \(3, 3\) do not fit a weight of 3 by 64 channels"):
        bound(weight, torch.ones(3, 3))
    with pytest.raises(ValueError, match="scales must be contiguous float32"):
        bound(weight, torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scales \(1, 2\) do not fit a weight of 3 by 64 channels"):
        bound(weight, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"a bias \(4,\) does not fit a weight of 3 by 64 channels"):
        bound(weight, torch.ones(3, 1), torch.ones(4))
    with pytest.raises(ValueError, match="64 channels cannot be cut into groups of 48"):
        bound(weight, torch.ones(3, 1), None, 48)
    with pytest.raises(ValueError, match="a power of two that divides 64, got 3"):
        bound(weight, torch.ones(3, 1), None, 64, 3)
    linear = bound(weight, torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"inputs \(2, 32\) do not fit a weight of 64 channels"):
        linear(torch.ones(2, 32))
    with pytest.raises(ValueError, match=r"factors \(2, 32\) do not fit inputs \(2, 64\)"):
        linear(torch.ones(2, 64), "silu", torch.ones(2, 32))
    with pytest.raises(ValueError, match=r"float32 or bfloat16 on the CPU, got torch\.float64"):
        linear.quantize(torch.ones(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"on the CPU, got torch\.float32 on meta"):
        linear(torch.ones(2, 64, device="meta"))
