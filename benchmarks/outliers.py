"""What quantizers stumble over, layer by layer: python benchmarks/outliers.py --json docs/outliers.json

On calibration frames of each policy, in full precision: how much larger than its median channel the largest
one is, at the inputs of the decoder's linears and in the residual stream, and how much of all attention the
first token swallows (an attention sink).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sqap
from sqap import environments
from sqap.compress import model_inputs
from sqap.files import write_json
from sqap.frames import collect_frames
from sqap.models.stream import LayerOutput
from sqap.policy import Policy

FRAMES = 24
INPUTS = {
    "q, k, v": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "gate, up": "mlp.gate_proj",
    "down": "mlp.down_proj",
}


class Channels:
    """The largest magnitude of each channel, over all tokens seen."""

    def __init__(self) -> None:
        self.largest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        largest = x.flatten(0, -2).abs().amax(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    @property
    def ratio(self) -> float:
        """The largest channel over the median one."""
        assert self.largest is not None
        return float(self.largest.max() / self.largest.median())


class FirstToken:
    """A `TokenPruner` that prunes nothing and asks how much attention the first token gets."""

    def __init__(self, layers: int) -> None:
        self.shares: list[list[float]] = [[] for _ in range(layers)]
        self.length = 0

    def score_rows(self, layer: int) -> Tensor:
        return torch.arange(self.length // 2, self.length)  # rows late enough to have others to look at

    def keep(self, layer: int, output: LayerOutput) -> None:
        assert output.received is not None
        self.shares[layer].append(float(output.received[0, 0]))


@torch.inference_mode()
def layer_outliers(policy: Policy, frames: list[sqap.Observation]) -> list[dict[str, Any]]:
    """One entry per decoder layer."""
    model = policy.model
    depth = policy.config.model.decoder.depth
    inputs = [{name: Channels() for name in (*INPUTS, "residual")} for _ in range(depth)]
    for layer, channels in zip(model.decoder.layers, inputs, strict=True):
        watch(layer, channels["residual"])
        for name, path in INPUTS.items():
            watch(layer.get_submodule(path), channels[name])
    first = FirstToken(depth)
    for seed, frame in enumerate(frames):
        given = model_inputs(policy, frame, seed)
        x = model.embed(given)
        first.length = x.shape[1]
        model.decoder(x, pruner=first)
    return [
        {
            "layer": i,
            "largest_over_median": {name: c.ratio for name, c in channels.items()},
            "first_token_attention": sum(shares) / len(shares),
        }
        for i, (channels, shares) in enumerate(zip(inputs, first.shares, strict=True))
    ]


def watch(module: nn.Module, channels: Channels) -> None:
    """Add every input of ``module`` to ``channels``."""
    module.register_forward_pre_hook(lambda _, args: channels.add(args[0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policies", nargs="*", default=["reference", "reference-smollm"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report, console = {}, Console()
    for name in args.policies:
        policy = sqap.load(name)
        frames = collect_frames(policy, "metaworld", environments.default_tasks("metaworld"), FRAMES)
        report[name] = layer_outliers(policy, frames)
        table = Table(
            "layer", *(f"input of {n}" for n in INPUTS), "residual", "on the first token", title=name
        )
        for row in report[name]:
            ratios = [f"{r:.0f}" for r in row["largest_over_median"].values()]
            table.add_row(str(row["layer"]), *ratios, f"{100 * row['first_token_attention']:.0f} %")
        console.print(table)
    if args.json is not None:
        write_json(args.json, {"frames": FRAMES, "policies": report})


if __name__ == "__main__":
    main()
