"""GPTQModel: 4-bit weights by GPTQ, activations left alone; evaluated through its plain torch kernel."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from hugging_face import main
from torch import Tensor

GROUPS = {"per-channel": -1, "group-64": 64, "group-32": 32}


def method(group_size: int) -> Any:
    def quantize(model: Any, calibration: Tensor, tokenizer: Any) -> Any:
        source = str(Path(sys.argv[1]) / "smollm2")  # it loads models itself
        settings = QuantizeConfig(bits=4, group_size=group_size, device="cpu")
        quantizer = GPTQModel.load(source, settings, device="cpu", dtype=torch.float32)
        quantizer.quantize(
            [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration.tolist()]
        )
        with tempfile.TemporaryDirectory() as directory:
            quantizer.save(directory)
            low = GPTQModel.load(directory, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float32)
        return low.model.eval()

    return quantize


main({f"w4a16 {name}": method(size) for name, size in GROUPS.items()}, ("gptqmodel",))
