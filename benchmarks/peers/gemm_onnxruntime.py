"""ONNX Runtime's products for gemm.py: dynamic 8 bits, and MatMulNBits (4-bit weights, inputs in 8 bits)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from gemm_serve import Array, Bind, Product, Weight, saturates, serve, threads
from onnx import ModelProto, TensorProto, helper, numpy_helper, save
from onnxruntime.quantization import QuantType, quantize_dynamic

DOMAINS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def model(node: Any, constants: dict[str, Array], k: int, n: int) -> ModelProto:
    """A graph of one node, of ``x`` and constants to ``y``."""
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)


def run(source: Any) -> Bind:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def bind(x: Array) -> Product:
        return lambda: session.run(None, {"x": x})

    return bind


def dynamic_int8(weight: Weight) -> Bind:
    n, k = weight.levels.shape
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder, "dense.onnx"), Path(folder, "small.onnx")
        save(model(node, {"w": np.ascontiguousarray(weight.dense().T)}, k, n), dense)
        quantize_dynamic(
            dense, small, per_channel=True, weight_type=QuantType.QInt8, reduce_range=saturates()
        )
        return run(str(small))


def n_bits(size: int) -> Any:
    """Groups of ``size``; ``accuracy_level=4`` lets it multiply integers."""

    def load(weight: Weight) -> Bind:
        n, k = weight.levels.shape
        stored = (weight.levels + 8).astype(np.uint8).reshape(n, k // size, size)
        packed = stored[..., ::2] | stored[..., 1::2] << 4
        scale = np.repeat(weight.scale, k // size)
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "scale"],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=size,
            accuracy_level=4,
        )
        return run(model(node, {"w": packed, "scale": scale}, k, n).SerializeToString())

    return load


serve(
    {"int8": dynamic_int8, "int4-g128": n_bits(128), "int4-g32": n_bits(32)},
    ("onnxruntime",),
    lambda outputs: outputs[0],
)
