"""llm-compressor: round-to-nearest and GPTQ, without rotations and with SpinQuant's Hadamard ones.

Its schemes are simulated in floats on whatever transformers runs on, so every width of activation can be
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from hugging_face import main
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from torch import Tensor


def scheme(activation_bits: int, group_size: int | None) -> QuantizationScheme:
    """4-bit weights, symmetric; dynamic symmetric activations per token, if they are below 16 bits."""
    grid = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    inputs = None
    if activation_bits < 16:
        inputs = QuantizationArgs(num_bits=activation_bits, symmetric=True, strategy="token", dynamic=True)
    weights = QuantizationArgs(num_bits=4, symmetric=True, **grid)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


def method(activation_bits: int, group_size: int | None, *, rotate: bool, gptq: bool) -> Any:
    """A recipe: SpinQuant's rotations if asked for, then one of the two ways to round."""
    groups = {"group_0": scheme(activation_bits, group_size)}
    rounding = GPTQModifier if gptq else QuantizationModifier
    recipe: list[Any] = [rounding(config_groups=groups, ignore=["lm_head"])]
    if rotate:  # "hadamard" alone takes powers of two only, and 576 is none
        recipe.insert(0, SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard"))

    def quantize(model: Any, calibration: Tensor, tokenizer: Any) -> Any:
        torch.manual_seed(0)
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_dict(_rows(calibration)),
            recipe=recipe,
            max_seq_length=calibration.shape[1],
            num_calibration_samples=len(calibration),
        )
        return model.eval()

    return quantize


def _rows(ids: Tensor) -> dict[str, Sequence[Sequence[int]]]:
    return {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}


GRIDS = {"per-channel": None, "group-64": 64, "group-32": 32}
ROUNDINGS = {"rtn": (False, False), "gptq": (False, True), "spinquant rtn": (True, False)}
ROUNDINGS["spinquant gptq"] = (True, True)

main(
    {
        f"w4a{bits} {how} {grid}": method(bits, size, rotate=rotate, gptq=gptq)
        for bits in (4, 8, 16)
        for how, (rotate, gptq) in ROUNDINGS.items()
        for grid, size in GRIDS.items()
    },
    ("llmcompressor", "compressed-tensors"),
)
