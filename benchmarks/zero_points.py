"""Zero points for weights or activations, beside ``correction``: python benchmarks/zero_points.py --json FILE

W4A8 perplexity of SmolLM2-135M as in `llm_perplexity`, with scales for groups of 32 weights. No kernel of
sqap multiplies weights with zero points, so these are simulated: rounded by the same clip search and GPTQ,
and multiplied as floats by activations that are rounded as the kernels round them. Interrupted, it goes on
where it was.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import smollm
import torch
import torch.nn.functional as F
from llm_perplexity import quantized, read_text, regrid
from perplexity import perplexity
from results import Results
from rich.console import Console
from torch import Tensor, nn
from variants import decoder_alone

from sqap.files import write_json
from sqap.kernels.levels import by_group, dequantize_activation, quantize_activation
from sqap.quantization.gptq import Factor
from sqap.quantization.grid import scale_shape
from sqap.quantization.linear import QuantizedLinear
from sqap.quantization.rotation import HadamardLinear
from sqap.recipe import Quantization, Recipe, Scheme

GROUP = 32
CORRECTIONS = (0.5, 0.0, 0.25, 1.0)  # in the order they are measured in
OFFSETS = ("weights", "none", "activations")  # what has a zero point
LEVELS = 15  # steps from the smallest of 16 levels to the largest


class OffsetLinear(nn.Module):
    """Weights on 4-bit grids with zero points, as floats, times quantized activations."""

    def __init__(self, linear: nn.Linear, weight: Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.linear, self.scheme = linear, scheme
        linear.weight = nn.Parameter(weight, requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: Scheme, *, clip: bool = False, factor: Factor | None = None
    ) -> OffsetLinear:
        """As `QuantizedLinear.from_linear`, on grids that lie around the middle of each group's weights."""
        weight = linear.weight.detach()
        offset = zero_points(weight, scheme.group_size or weight.shape[1])
        shifted = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        shifted.weight = nn.Parameter(weight - offset, requires_grad=False)
        # GPTQ moves errors, and an error is the same on both sides of a shift.
        rounded = QuantizedLinear.from_linear(shifted, scheme, clip=clip, factor=factor)
        return cls(linear, rounded.dequantized() + offset, scheme)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        wide = (self.linear.rotate_input(x) if isinstance(self.linear, HadamardLinear) else x).float()
        scheme = self.scheme
        grid = quantize_activation(wide, scheme.activation_bits, "token", scheme.activation_symmetric)
        return F.linear(dequantize_activation(*grid), self.linear.weight).to(x.dtype)


def zero_points(weight: Tensor, group: int) -> Tensor:
    """What a symmetric grid must be shifted by to span each group's weights: ``(out, in)``."""
    grouped = by_group(weight, weight.new_empty(scale_shape(*weight.shape, "group", group)))
    low, high = grouped.aminmax(dim=2, keepdim=True)
    return (low + (high - low) * 8 / LEVELS).expand_as(grouped).flatten(1)


def variants() -> dict[str, tuple[str, Quantization]]:
    """Name -> what has a zero point, and the quantization, in the order of measuring."""
    preset = regrid(decoder_alone(Recipe.w4a8()), weight_granularity="group", group_size=GROUP)
    found = {}
    for offset in OFFSETS:
        for correction in CORRECTIONS:
            made = regrid(preset, activation_symmetric=offset != "activations")
            found[f"{offset} {correction:g}"] = offset, replace(made, correction=correction)
    return found


def measure(
    model: smollm.LanguageModel,
    offset: str,
    quantization: Quantization,
    tokens: dict[str, Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Perplexity of the model, quantized; ``offset`` "weights" gives its weights zero points."""
    kind = OffsetLinear if offset == "weights" else QuantizedLinear
    with mock.patch("sqap.quantization.sequential.QuantizedLinear", kind):
        small = quantized(model, quantization, tokens["calibration"], progress)
    return perplexity(small.logits, tokens["evaluation"])


def table(full: float, measured: dict[str, float]) -> str:
    """Perplexities as Markdown, with the loss against full precision."""
    order = sorted(CORRECTIONS)
    lines = ["| zero points of | " + " | ".join(f"`correction` {c:g}" for c in order) + " |"]
    lines.append("|---|" + "---|" * len(order))
    for offset in ("none", "activations", "weights"):
        found = [measured[f"{offset} {c:g}"] for c in order]
        lines.append(f"| {offset} | " + " | ".join(f"{p:.2f} ({p / full - 1:+.1%})" for p in found) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--out", type=Path, default=Path("runs/zero_points"), help="results so far")
    args = parser.parse_args()
    console = Console()
    tokens, source = read_text()
    evaluated = hashlib.sha256(tokens["evaluation"].numpy().tobytes()).hexdigest()
    results = Results(args.out / "results.json")
    model = smollm.load_smollm()

    def told(name: str, settings: str, found: Callable[[], float]) -> float:
        row: dict[str, Any] = results.get(name, evaluated + settings, lambda: {"perplexity": found()})
        console.print(f"{name}: {row['perplexity']:.3f}")
        return float(row["perplexity"])

    full = told("full", "", lambda: perplexity(model.logits, tokens["evaluation"]))
    measured = {
        name: told(name, repr(made), lambda offset=offset, made=made: measure(model, offset, made, tokens))
        for name, (offset, made) in variants().items()
    }
    console.print(table(full, measured), soft_wrap=True)
    if args.json:
        weights = {"package": smollm.PACKAGE, "sha256": smollm.weights_sha256()}
        result = {"group": GROUP, "full": full, "perplexity": measured, "text": source, "weights": weights}
        write_json(args.json, result | {"torch": torch.__version__})


if __name__ == "__main__":
    main()
