"""OpenVINO's products for gemm.py, of weights that NNCF compresses."""

from __future__ import annotations

from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
from gemm_serve import Array, Bind, Product, Weight, saturates, serve, threads
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

GROUP = 128
CALIBRATION = 34  # tokens


def load(compress: Any, settings: dict[str, Any]) -> Any:
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads(), **settings}

    def of(weight: Weight) -> Bind:
        inputs = ops.parameter([-1, weight.levels.shape[1]], np.float32)
        product = ops.matmul(inputs, ops.constant(weight.dense()), False, True)
        model = compress(ov.Model([product], [inputs]))
        compiled = ov.Core().compile_model(model, "CPU", settings)

        def bind(x: Array) -> Product:
            request = compiled.create_infer_request()
            request.set_input_tensor(ov.Tensor(x))

            def call() -> ov.Tensor:
                request.infer()
                return request.get_output_tensor()

            return call

        return bind

    return of


def static_int8(model: ov.Model) -> ov.Model:
    """Both sides in 8 bits, the input's range calibrated."""
    k = model.input(0).partial_shape[1].get_length()
    x = np.random.default_rng(0).standard_normal((CALIBRATION, k), dtype=np.float32)
    overflow = OverflowFix.ENABLE if saturates() else OverflowFix.DISABLE
    settings = AdvancedQuantizationParameters(overflow_fix=overflow)
    return nncf.quantize(model, nncf.Dataset([x]), subset_size=1, advanced_parameters=settings)


def int8(model: ov.Model) -> ov.Model:
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def int4(model: ov.Model) -> ov.Model:
    mode = nncf.CompressWeightsMode.INT4_SYM
    return nncf.compress_weights(model, mode=mode, group_size=GROUP, ratio=1.0, all_layers=True)


nncf.set_log_level(40)
dynamic = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP}
serve(
    {
        "int8-static": load(static_int8, {}),
        "int8": load(int8, dynamic),
        "int4-g128": load(int4, dynamic),
    },
    ("openvino", "nncf"),
    lambda y: y.data,
)
