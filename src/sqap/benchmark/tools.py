"""Other tools that run networks: each takes one and an example of its inputs, and says what runs it."""

from __future__ import annotations

import contextlib
import logging
import os
import site
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sqap.benchmark.exported import Arrays, Network
from sqap.kernels import cpu

GROUP = 128


def openvino(network: nn.Module, example: tuple[Tensor, ...], *, bits: int) -> tuple[Network, int]:
    """OpenVINO: NNCF's compressed weights, inputs quantized as it runs where it can."""
    import nncf
    import openvino as ov

    nncf.set_log_level(40)
    modes = nncf.CompressWeightsMode
    how: dict[str, Any] = {"mode": modes.INT8_SYM}
    if bits == 4:
        narrow = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        )
        how = {"mode": modes.INT4_SYM, "group_size": GROUP, "ratio": 1.0, "all_layers": True}
        how["advanced_parameters"] = narrow  # where a width is no multiple of the group's
    with _quiet():
        model = ov.convert_model(network, example_input=example, input=[tuple(x.shape) for x in example])
        model = nncf.compress_weights(model, **how)
    nbytes = sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(inputs: Arrays) -> np.ndarray:
        request.infer(inputs, share_inputs=True)
        return np.array(request.get_output_tensor().data)

    return run, nbytes


def onnxruntime(network: nn.Module, example: tuple[Tensor, ...], *, bits: int) -> tuple[Network, int]:
    """ONNX Runtime: dynamic quantization to 8 bits, or MatMulNBits, which multiplies 4 bits with 8."""
    import onnx
    import onnxruntime as ort

    names = [f"x{i}" for i in range(len(example))]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        dense, small = Path(folder, "dense.onnx"), Path(folder, "small.onnx")
        torch.onnx.export(
            network, example, dense, input_names=names, dynamo=True, external_data=False, verbose=False
        )
        (_eight if bits == 8 else _four)(dense, small)
        model = onnx.load(small)
        nbytes = sum(len(onnx.numpy_helper.to_array(x).tobytes()) for x in model.graph.initializer)
        session = ort.InferenceSession(str(small), _options(), providers=["CPUExecutionProvider"])

    def run(inputs: Arrays) -> np.ndarray:
        out: np.ndarray = session.run(None, dict(zip(names, inputs, strict=True)))[0]
        return out

    return run, nbytes


def _eight(dense: Path, small: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Of x86 without VNNI, sums of 8-bit products saturate: its makers advise seven bits there.
    paths = cpu.paths()
    saturates = "avx2" in paths and not any("vnni" in path for path in paths)
    how = {"per_channel": True, "reduce_range": saturates, "weight_type": QuantType.QInt8}
    quantize_dynamic(dense, small, op_types_to_quantize=["MatMul"], **how)


def _four(dense: Path, small: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    how = {"block_size": GROUP, "is_symmetric": True, "accuracy_level": 4}
    quantizer = MatMulNBitsQuantizer(onnx.load(dense), **how)
    quantizer.process()
    quantizer.model.save_model_to_file(str(small))


@cache
def _options() -> Any:
    """One team of threads for all networks: each would have its own, spinning while another works."""
    import onnxruntime as ort

    ort.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    return options


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about what they cannot know, and count what they do."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is a semaphore, which outlives a process that is ended
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def add_environment(folder: Path) -> None:
    """Let what is installed in a virtual environment be imported, behind what is installed here."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site.addsitedir(str(folder / "lib" / version / "site-packages"))
