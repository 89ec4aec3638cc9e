"""torchao's round-to-nearest: 4-bit weights alone, and with dynamic 8-bit activations."""

from __future__ import annotations

from typing import Any

import torch
from hugging_face import main
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

GRANULARITIES = {"per-channel": PerAxis(0), "group-64": PerGroup(64), "group-32": PerGroup(32)}


def weights(granularity: str) -> Any:
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=GRANULARITIES[granularity])
    return lambda model, calibration, tokenizer: _quantized(model, config)


def both(granularity: str) -> Any:
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=GRANULARITIES[granularity]
    )
    return lambda model, calibration, tokenizer: _quantized(model, config)


def _quantized(model: Any, config: Any) -> Any:
    layers = model.model.layers  # the head stays in full precision, as it does in ours
    quantize_(layers, config)
    return model


main(
    {f"w4a16 {name}": weights(name) for name in GRANULARITIES}
    | {f"w4a8 {name}": both(name) for name in GRANULARITIES},
    ("torchao",),
)
