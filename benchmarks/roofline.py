"""How far each stage of a step is from what the machine can do: python benchmarks/roofline.py reference

Counts the operations and the weights' bytes of a compressed policy's step, measures what the processor and
its memory can do at most, and times the stages with `sqap bench`. docs/roofline.md says what it means.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers.gemm_process import Ceilings
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from sqap.benchmark import SHAPES, Subject, bench
from sqap.benchmark.candidates import example
from sqap.files import write_json
from sqap.kernels import cpu
from sqap.models.decoder import Attention
from sqap.models.transformer import SelfAttention
from sqap.policy import Policy
from sqap.process import available_cores
from sqap.quantization import QuantizedLinear
from sqap.recipe import Recipe

STAGES = ("vision", "projector", "decoder", "head")
HEADER = (
    "stage",
    "integers, Gop",
    "floats, Gop",
    "weights, MB",
    "at least, ms",
    "ms",
    "Gop/s",
    "of the ceiling",
)


@dataclass
class Work:
    """Of one stage: a multiplication and an addition are two operations; bytes are of the weights read."""

    integer_ops: float = 0.0
    float_ops: float = 0.0
    weight_bytes: float = 0.0

    def shortest_ms(self, ceilings: Mapping[str, float]) -> float:
        """With the arithmetic, or the memory, at its ceiling all the time; whichever takes longer."""
        computing = self.integer_ops / ceilings["peak_gops"] + self.float_ops / ceilings["peak_fp32_gflops"]
        return max(computing, self.weight_bytes / ceilings["bandwidth_gbs"]) / 1e6


def count(policy: Policy) -> dict[str, Work]:
    """Stage -> work of one step, seen while it runs layer by layer."""
    work: dict[str, Work] = defaultdict(Work)
    hooks = []
    for name, module in policy.model.named_modules():
        if getattr(module, "fused", None) is not None:
            module.fused = None  # in one native call, its parts would not be seen
        stage = work[name.split(".")[0] if name.split(".")[0] in STAGES else "head"]

        def look(module: nn.Module, given: tuple[Any, ...], out: Any, stage: Work = stage) -> None:
            _add(stage, module, given[0], out)

        if isinstance(module, QuantizedLinear | nn.Linear | nn.Conv2d | Attention | SelfAttention):
            hooks.append(module.register_forward_hook(look))
    policy.act(example(policy), seed=0)
    for hook in hooks:
        hook.remove()
    return {stage: work[stage] for stage in STAGES}


def _add(stage: Work, module: nn.Module, x: Tensor, out: Any) -> None:
    """What one call of a module adds to its stage."""
    if isinstance(module, QuantizedLinear):
        stage.integer_ops += 2 * x.numel() * module.out_features
        stage.weight_bytes += module.weight.nbytes + module.scale.nbytes
    elif isinstance(module, nn.Linear):
        stage.float_ops += 2 * x.numel() * module.out_features
        stage.weight_bytes += module.weight.nbytes
    elif isinstance(module, nn.Conv2d):
        stage.float_ops += 2 * out.numel() * module.weight[0].numel()
        stage.weight_bytes += module.weight.nbytes
    elif isinstance(module, SelfAttention):
        stage.float_ops += 4 * x.numel() * x.shape[1]
    elif isinstance(module, Attention):  # of a prefill; a causal one looks at half of all pairs
        pairs = x.shape[0] * x.shape[1] * (x.shape[1] + 1 if module.causal else 2 * x.shape[1]) / 2
        stage.float_ops += 4 * pairs * module.heads * module.head_dim


def measure(subject: Subject, threads: int, steps: int, console: Console) -> dict[str, Any]:
    """The file that ``--json`` names."""
    torch.set_num_threads(threads)
    work = count(subject.load())
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        ceilings = Ceilings(cpu.chosen(), threads, Path(folder))
        ceilings.look()
        bar = progress.add_task("steps")

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        report = bench(subject, [], steps=steps, threads=threads, progress=show)
        ceilings.look()
    found = ceilings.best
    if "ceilings_reason" in found:
        raise SystemExit(f"the ceilings cannot be measured: {found['ceilings_reason']}")
    if not found["peak_gops"]:
        raise SystemExit(f"no ceiling is known for the {cpu.chosen()!r} kernels")
    timed = report["candidates"]["sqap"]
    stages = {
        name: {**asdict(done), "shortest_ms": done.shortest_ms(found), "ms": timed["stages_ms"][name]}
        for name, done in work.items()
    }
    rest = {name: timed["stages_ms"][name] for name in ("preprocess", "selection")}
    return {**found, "p50_ms": timed["p50_ms"], "stages": stages, "other_ms": rest} | {
        key: report[key] for key in ("subject", "recipe", "threads", "steps", "machine")
    }


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A line per stage, and the rest."""
    lines = []
    for name, stage in result["stages"].items():
        speed = (stage["integer_ops"] + stage["float_ops"]) / stage["ms"] / 1e6
        lines.append(
            [
                name,
                *(f"{stage[key] / 1e9:.2f}" for key in ("integer_ops", "float_ops")),
                f"{stage['weight_bytes'] / 1e6:.1f}",
                *(f"{stage[key]:.1f}" for key in ("shortest_ms", "ms")),
                f"{speed:.0f}",
                f"{100 * stage['shortest_ms'] / stage['ms']:.0f} %",
            ]
        )
    lines += [[name, *[""] * 4, f"{ms:.1f}", "", ""] for name, ms in result["other_ms"].items()]
    return lines


HEADER = (
    "stage",
    "Gop of integers",
    "Gop of floats",
    "MB of weights",
    "at least, ms",
    "ms",
    "Gop/s",
    "of the ceiling",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", help=f"a policy, or one of {', '.join(SHAPES)} with random weights")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--keep", type=float, default=0.6, help="share of visual tokens")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    console = Console(stderr=args.markdown)
    subject = Subject(args.policy, Recipe.w4a8(args.keep), random=args.policy in SHAPES)
    result = measure(subject, args.threads, args.steps, console)
    if args.json:
        write_json(args.json, result)
    if args.markdown:
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
        print("\n".join(f"| {' | '.join(line)} |" for line in rows(result)))
        return
    table = Table(*HEADER, title=f"{args.policy}, {args.threads} threads", title_justify="left")
    for line in rows(result):
        table.add_row(*line)
    table.columns[0].no_wrap = True
    ceilings = "peak_gops", "peak_fp32_gflops", "bandwidth_gbs"
    table.caption = ", ".join(f"{name} {result[name]:.0f}" for name in ceilings)
    console.print(table)


if __name__ == "__main__":
    main()
