"""llama.cpp's products for gemm.py: ggml's own, through the shared libraries that its build leaves.

Weights go where llama.cpp puts them when it loads a model: into the first of the processor's buffers that
take the product, those that lay weights out anew before plain memory.
"""

from __future__ import annotations

import sys
import weakref
from ctypes import (
    CDLL,
    CFUNCTYPE,
    POINTER,
    RTLD_GLOBAL,
    Structure,
    c_bool,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_void_p,
)
from pathlib import Path
from typing import Any

import numpy as np
from gemm_serve import Array, Bind, Product, Weight, serve, threads

LIBRARIES = Path(sys.prefix) / "build" / "bin"
F32, Q4_0, Q8_0 = 0, 2, 8
ARENA = 1 << 20  # bytes for what describes tensors and a graph


class Params(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def library(part: str) -> CDLL:
    found = [*LIBRARIES.glob(f"libggml-{part}.so"), *LIBRARIES.glob(f"libggml-{part}.dylib")]
    return CDLL(str(found[0]), RTLD_GLOBAL)


BASE = library("base")
CPU = library("cpu")


def function(name: str, result: Any, *arguments: Any, of: CDLL = BASE) -> Any:
    found = getattr(of, f"ggml_{name}")
    found.restype, found.argtypes = result, arguments
    return found


P = c_void_p
init = function("init", P, Params)
free = function("free", None, P)
version = function("version", c_char_p)
new_tensor = function("new_tensor_2d", P, P, c_int, c_int64, c_int64)
mul_mat = function("mul_mat", P, P, P, P)
new_graph = function("new_graph", P, P)
expand = function("build_forward_expand", None, P, P)
nbytes = function("nbytes", c_size_t, P)
quantize = function("quantize_chunk", c_size_t, c_int, P, P, c_int64, c_int64, c_int64, P)
allocate = function("backend_alloc_ctx_tensors_from_buft", P, P, P)
release = function("backend_buffer_free", None, P)
put = function("backend_tensor_set", None, P, P, c_size_t, c_size_t)
get = function("backend_tensor_get", None, P, P, c_size_t, c_size_t)
compute = function("backend_graph_compute", c_int, P, P)
supports = function("backend_dev_supports_op", c_bool, P, P)
BACKEND = function("backend_cpu_init", P, of=CPU)()
DEVICE = function("backend_get_device", P, P)(BACKEND)
PLAIN = function("backend_dev_buffer_type", P, P)(DEVICE)


class Arena:
    """Tensors, and the memory they lie in; freed when nobody holds it."""

    def __init__(self) -> None:
        self.context = init(Params(ARENA, None, True))
        weakref.finalize(self, free, self.context)

    def allocate(self, kind: int) -> None:
        buffer = allocate(self.context, kind)
        if not buffer:
            raise MemoryError("ggml cannot allocate a tensor")
        weakref.finalize(self, release, buffer)


def buffers() -> list[int]:
    """Kinds of memory for weights, the preferred first."""
    look_up = function("backend_reg_get_proc_address", P, P, c_char_p)
    address = look_up(function("backend_cpu_reg", P, of=CPU)(), b"ggml_backend_dev_get_extra_bufts")
    found = []
    if address:
        extra = CFUNCTYPE(POINTER(P), P)(address)(DEVICE)
        while extra and extra[len(found)]:
            found.append(extra[len(found)])
    return [*found, PLAIN]


def place(n: int, k: int, kind: int) -> tuple[Arena, int]:
    """A tensor for weights. A buffer says whether it takes a product once the weight is in it."""
    for buffer in buffers():
        arena, probe = Arena(), Arena()
        tensor = new_tensor(arena.context, kind, k, n)
        arena.allocate(buffer)
        if supports(DEVICE, mul_mat(probe.context, tensor, new_tensor(probe.context, F32, k, 1))):
            return arena, tensor
    raise RuntimeError("no buffer of ggml's takes this product")


def load(kind: int) -> Any:
    def of(weight: Weight) -> Bind:
        n, k = weight.levels.shape
        arena, matrix = place(n, k, kind)
        dense = weight.dense()
        stored = np.empty(nbytes(matrix), dtype=np.uint8)
        quantize(kind, dense.ctypes.data, stored.ctypes.data, 0, n, k, None)
        put(matrix, stored.ctypes.data, 0, stored.nbytes)
        return lambda x: bind(arena, matrix, n, x)

    return of


def bind(weights: Arena, matrix: int, n: int, x: Array) -> Product:
    arena = Arena()
    inputs = new_tensor(arena.context, F32, x.shape[1], x.shape[0])
    product = mul_mat(arena.context, matrix, inputs)
    arena.allocate(PLAIN)
    graph = new_graph(arena.context)
    expand(graph, product)
    put(inputs, x.ctypes.data, 0, x.nbytes)

    def call() -> tuple[Arena, Arena, int, tuple[int, int]]:
        if compute(BACKEND, graph):
            raise RuntimeError("ggml could not compute the product")
        return weights, arena, product, (len(x), n)  # with what keeps the memory

    return call


def to_array(result: tuple[Arena, Arena, int, tuple[int, int]]) -> Array:
    y = np.empty(result[3], dtype=np.float32)
    get(result[2], y.ctypes.data, 0, y.nbytes)
    return y


function("backend_cpu_set_n_threads", None, P, c_int, of=CPU)(BACKEND, threads())
serve({"q4_0": load(Q4_0), "q8_0": load(Q8_0)}, {"ggml": version().decode()}, to_array)
