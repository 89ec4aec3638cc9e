"""Naive against designed, in closed loop: python benchmarks/naive_vs_designed.py --json results.json

Full precision; quantization alone; pruning alone by attention ranking, at random and on a uniform grid;
the naive combination of the two; and the method. Every variant runs the same seeds with the same
diffusion noise, so any two are compared in pairs. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from variants import compare, describe, run_variants

from sqap.evaluation.executors import Run
from sqap.files import write_json
from sqap.recipe import Pruning, PruningMethod, Quantization, Recipe, Scheme

SEED = 1_000_000
BASELINES: tuple[PruningMethod, ...] = ("attention", "random", "uniform")
KEEPS = (0.6, 0.4, 0.25)
NAIVE_W4A4 = Quantization(Scheme(4, 4), rotate=False)
# One scale for a whole matrix of weights, one for all tokens: the same bits, spent worse.
COARSE_W4A4 = Quantization(Scheme(4, 4, "tensor", activation_granularity="tensor"), rotate=False)
MAIN = (
    "full",
    "w4a4-rtn",
    "w4a8",
    "w4a4",
    "method-w4a8-0.6",
    "method-w4a8-0.4",
    "w4a8-random-0.4",
    "method-w4a8-0.4-layer3",
    "w4a8-random-0.4-layer3",
    "paper",
)


def recipes() -> dict[str, Recipe]:
    """Name -> recipe, in the order of the table."""
    table = {
        "full": Recipe(),
        "w4a4-rtn": Recipe(NAIVE_W4A4),
        "w4a4": Recipe(Quantization(Scheme(4, 4))),
        "w4a8": Recipe(Quantization(Scheme(4, 8))),
    }
    for method in BASELINES:
        for keep in KEEPS:
            table[f"{method}-{keep}"] = Recipe(pruning=Pruning(keep_ratio=keep, method=method))
    for keep in KEEPS:
        table[f"w4a4-rtn-attention-{keep}"] = Recipe(NAIVE_W4A4, Pruning(keep_ratio=keep, method="attention"))
    for keep in KEEPS:
        mix = Recipe.w4a8(keep).pruning
        table[f"method-w4a8-{keep}"] = Recipe(Quantization(Scheme(4, 8)), mix)
        table[f"method-w4a4-{keep}"] = Recipe(Quantization(Scheme(4, 4)), mix)
        table[f"w4a8-random-{keep}"] = Recipe(
            Quantization(Scheme(4, 8)), Pruning(keep_ratio=keep, method="random")
        )
    # One layer later, where attention has become a usable ranking.
    later = Pruning(0.4, 3, "sqap", score_layers=(0, 1, 2), top_share=0.25, ring_share=0.1)
    table["method-w4a8-0.4-layer3"] = Recipe(Quantization(Scheme(4, 8)), later)
    table["w4a8-random-0.4-layer3"] = Recipe(Quantization(Scheme(4, 8)), Pruning(0.4, 3, method="random"))
    table["paper"] = Recipe.paper()
    table["w4a4-coarse"] = Recipe(COARSE_W4A4)
    table["w4a4-coarse-rotated"] = Recipe(dataclasses.replace(COARSE_W4A4, rotate=True))
    table["w4a4-coarse-attention-0.4"] = Recipe(COARSE_W4A4, Pruning(keep_ratio=0.4, method="attention"))
    return table


def report(runs: dict[str, Run]) -> dict[str, Any]:
    """Success of each variant, and its paired difference from full precision and, pruned, from random."""
    result: dict[str, Any] = {}
    for name, run in runs.items():
        result[name] = describe(run)
        if name != "full":
            result[name]["against_full"] = compare(run, runs["full"])
    for suffix in (*KEEPS, "0.4-layer3"):
        method, random = f"method-w4a8-{suffix}", f"w4a8-random-{suffix}"
        result[method]["against_random"] = compare(runs[method], runs[random])
    return result


def table(result: dict[str, Any]) -> str:
    """The report as a Markdown table: success in percent, paired differences in points."""
    lines = [
        "| variant | episodes | success | 95 % interval | minus full | 95 % interval | wins : losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        cells = [name, row["episodes"], f"{100 * row['success']:.1f}", _points(row["success_ci95"])]
        against = row.get("against_full")
        if against:
            cells += [f"{100 * against['difference']:+.1f}", _points(against["difference_ci95"])]
            cells += [f"{against['wins']} : {against['losses']}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |" * (8 - len(cells)))
    return "\n".join(lines)


def _points(bounds: list[float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="reference")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--out", type=Path, default=Path("runs/naive_vs_designed"), help="logs and policies")
    parser.add_argument("--episodes", type=int, default=30, help="per task, for the main variants")
    parser.add_argument("--few", type=int, default=10, help="per task, for the others")
    parser.add_argument("--workers", type=int, default=2, help="episodes at a time")
    args = parser.parse_args()
    console = Console()
    chosen = recipes()
    episodes = dict.fromkeys(chosen, args.few)
    episodes |= dict.fromkeys(MAIN, args.episodes)
    runs = run_variants(
        args.policy, chosen, episodes=episodes, seed=SEED, out=args.out, workers=args.workers, console=console
    )
    result = report(runs)
    print(table(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
