"""The error of rounding a flow head's action linears: python benchmarks/action_head.py --json PATH

VLAQuantBench reports that pi0.5 loses its tasks when its action head is rounded to W4A4. Small policies with
random weights, shaped as pi0.5 and SmolVLA are, have their head rounded three times, everything else left as
it is: all of its linears to W4A4; all but those that the presets leave in bfloat16, which read or write
actions, states and the denoising time; and as the presets do, which give the rest of the head 8-bit
activations. The error is that of normalised actions, root mean square, over their spread.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sqap
from sqap.files import write_json
from sqap.models import VLA, DecoderConfig, FlowHeadConfig, ModelConfig, ModelInputs, VisionConfig
from sqap.models.decoder import RMSNorm
from sqap.quantization import list_linears, quantize_model
from sqap.recipe import Quantization, Recipe

TOKENS, VOCABULARY, PADDED, HORIZON = 12, 200, 32, 20
GAIN = 0.3  # deviation of a norm's gains, and of pi0.5's scales, shifts and gates


def shapes() -> dict[str, ModelConfig]:
    """A decoder of width 256 and four layers, an expert of width 128."""
    vision = VisionConfig(56, 14, 64, 2, 4, 128, activation="gelu_tanh")
    gemma = DecoderConfig(
        VOCABULARY,
        256,
        4,
        4,
        1,
        64,
        512,
        causal=False,
        embed_scale=16.0,
        activation="gelu_tanh",
        last_layer="keys_values",
    )
    llama = replace(gemma, kv_heads=2, activation="silu")
    head = FlowHeadConfig(action_dim=PADDED, horizon=HORIZON, width=128, mlp_width=256)
    every = replace(head, self_attention_every=1, causal_actions=False, adaptive_norms=True)
    pi05 = ModelConfig((vision,), (256,), gemma, every, cameras=2, image_first=True, state_in="text")
    smolvla = ModelConfig(
        (vision,), (256,), llama, head, cameras=2, proprio_dim=PADDED, proprio_layers=1, image_first=True
    )
    return {"pi0.5": pi05, "SmolVLA": smolvla}


def random_model(config: ModelConfig) -> VLA:
    """Random weights; gains of norms and gates are about 1, scales and shifts about 0."""
    torch.manual_seed(0)
    model = VLA(config).eval().requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.weight.add_(GAIN * torch.randn_like(module.weight))
        if isinstance(module, nn.Linear):
            sharp = 2.0 if name.endswith(("q_proj", "k_proj")) else 1.0
            deviation = GAIN if name.endswith("dense") else sharp
            module.weight.normal_(0, deviation * module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
            if name.endswith("dense"):
                module.bias.chunk(3)[2].fill_(1)  # scale, shift, gate
    return model


def random_inputs(config: ModelConfig, seed: int) -> ModelInputs:
    """Noise as pictures, words, states and the actions that are denoised."""
    generator = torch.Generator().manual_seed(seed)
    side = config.vision[0].image_size
    pixels = torch.randn(config.cameras, 3, side, side, generator=generator)
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
    noise = torch.randn(1, HORIZON, PADDED, generator=generator)
    state = torch.randn(1, PADDED, generator=generator) if config.proprio_dim else None
    return ModelInputs([pixels], ids, noise, state)


def settings() -> dict[str, Quantization]:
    """The preset w4a4 with nothing but the head rounded, and two ways to round more of it."""
    preset = Recipe.w4a4().quantization
    assert preset is not None
    rest = replace(preset, decoder=None, vision=None, projector=None, rotate=False, rotation_seed=None)
    head = replace(rest, embedding_bits=16)
    four = replace(head, head=preset.decoder)
    return {
        "all W4A4": replace(four, sensitive=preset.decoder),
        "W4A4, sensitive ones kept": four,
        "the preset": head,
    }


@torch.inference_mode()
def measure(config: ModelConfig, observations: int) -> dict[str, Any]:
    """Errors by what is rounded, and how many of the head's weights are left as they are."""
    model, seen = random_model(config), [random_inputs(config, i) for i in range(2 * observations)]
    calibration, held_out = seen[:observations], seen[observations:]
    exact = torch.cat([model(given) for given in held_out])
    found: dict[str, Any] = {}
    for name, quantization in settings().items():
        small = quantize_model(model, quantization, calibration)
        head = [linear for linear in list_linears(small) if linear.part == "head"]
        counts = {kept: _weights(head, kept) for kept in (True, False)}
        actions = torch.cat([small(given) for given in held_out])
        found[name] = {"error": _error(actions, exact), "floats": counts[False] / sum(counts.values())}
    return found


def _weights(linears: list[Any], quantized: bool) -> int:
    return sum(x.in_features * x.out_features for x in linears if x.quantized == quantized)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean().sqrt() / exact.std())


def show(results: Mapping[str, Any]) -> Table:
    """One row for each policy."""
    table = Table("head", *settings(), "weights left in bfloat16")
    for name, found in results.items():
        errors = [f"{100 * found[setting]['error']:.2f} %" for setting in settings()]
        table.add_row(name, *errors, f"{100 * found['the preset']['floats']:.1f} %")
    return table


def main() -> None:
    """Print, and write if it is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--observations", type=int, default=8, help="to calibrate on, and as many to compare")
    args = parser.parse_args()
    results = {name: measure(config, args.observations) for name, config in shapes().items()}
    Console(width=100).print(show(results))
    if args.json is not None:
        write_json(args.json, {"sqap": sqap.__version__, **results})


if __name__ == "__main__":
    main()
