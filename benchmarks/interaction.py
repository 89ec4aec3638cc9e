"""Does quantizing cost more under pruning? python benchmarks/interaction.py --json docs/interaction.json

The paper claims that quantization spoils the attention that pruning ranks by, and that its method repairs
that. Each bundled policy in full precision, W4A8, W4A4 by the method and W4A4 rounded to nearest; each of
them without pruning, and with four criteria at three budgets behind the third decoder layer. That makes
52 cells on the same seeds with the same diffusion noise. The interaction is what quantizing costs a
pruned policy beyond what it costs the unpruned one; its interval is a bootstrap over tasks. Interrupted,
it goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from variants import ENV, FRAMES, describe, outcomes, run_saved

import sqap
from sqap import environments
from sqap.build import build_id
from sqap.compress import reprune
from sqap.files import write_json
from sqap.frames import collect_frames
from sqap.recipe import Pruning, PruningMethod, Quantization, Recipe, Scheme

SEED = 3_500_000
POLICIES = ("reference-smollm", "reference")
QUANTIZATIONS = {
    "full": None,
    "w4a8": Recipe.w4a8(keep=1).quantization,
    "w4a4": Recipe.w4a4(keep=1).quantization,
    "w4a4-rtn": Quantization(Scheme(4, 4), rotate=False),
}
METHODS: tuple[PruningMethod, ...] = ("attention", "random", "sqap", "lookahead")
KEEPS = (0.6, 0.4, 0.25)
AFTER = 3
EPISODES = 10  # per task
RESAMPLES = 10_000

Success = Mapping[tuple[str, int], bool]


def prunings() -> dict[str, Pruning | None]:
    """Name -> setting; the first prunes nothing."""
    settings: dict[str, Pruning | None] = {"unpruned": None}
    for method in METHODS:
        for keep in KEEPS:
            settings[f"{method}-{keep}"] = Pruning(keep, AFTER, method)
    return settings


def run(source: str, out: Path, workers: int, console: Console) -> dict[str, Any]:
    """All cells of one policy, and the interactions."""
    policy = sqap.load(source)
    frames = collect_frames(policy, ENV, environments.default_tasks(ENV), FRAMES)
    won: dict[str, dict[str, Success]] = {}
    result: dict[str, Any] = {}
    for name, quantization in QUANTIZATIONS.items():
        base = sqap.compress(policy, Recipe(quantization), frames)

        def directories(name: str = name, base: sqap.Policy = base) -> Iterator[tuple[str, Path]]:
            for cell, pruning in prunings().items():
                directory = out / source / "policies" / f"{name}-{cell}"
                reprune(policy, base, pruning, frames).save(directory)
                yield cell, directory

        runs = run_saved(
            directories(),
            episodes=dict.fromkeys(prunings(), EPISODES),
            seed=SEED,
            out=out / source,
            workers=workers,
            console=console,
        )
        won[name] = {cell: outcomes(run) for cell, run in runs.items()}
        result[name] = {cell: describe(run) for cell, run in runs.items()}
    for name in ("w4a8", "w4a4", "w4a4-rtn"):
        for cell in prunings():
            if cell != "unpruned":
                result[name][cell]["interaction"] = interaction(won["full"], won[name], cell)
    return result


def interaction(full: Mapping[str, Success], quantized: Mapping[str, Success], cell: str) -> dict[str, Any]:
    """The cost of quantizing under pruning beyond its cost without, and a 95 % bootstrap over tasks.

    Negative where the two together lose more than one by one.
    """
    by_task: dict[str, list[int]] = {}
    for key in full[cell]:
        pruned = int(quantized[cell][key]) - int(full[cell][key])
        alone = int(quantized["unpruned"][key]) - int(full["unpruned"][key])
        by_task.setdefault(key[0], []).append(pruned - alone)
    means = np.array([np.mean(values) for values in by_task.values()])
    drawn = np.random.default_rng(0).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.quantile(means[drawn].mean(1), (0.025, 0.975))
    return {"difference": float(means.mean()), "ci95": [float(low), float(high)]}


def table(result: Mapping[str, Any]) -> str:
    """One policy's success in percent, and the interactions in points."""
    lines = [
        "| pruning | " + " | ".join(QUANTIZATIONS) + " |",
        "|---|" + "---|" * len(QUANTIZATIONS),
    ]
    for cell in prunings():
        cells = []
        for name in QUANTIZATIONS:
            row = result[name][cell]
            text = f"{100 * row['success']:.1f}"
            if "interaction" in row:
                low, high = (f"{100 * bound:+.0f}" for bound in row["interaction"]["ci95"])
                text += f" ({100 * row['interaction']['difference']:+.1f}, {low} to {high})"
            cells.append(text)
        lines.append(f"| {cell} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", action="append", help="one of the bundled ones; both by default")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--out", type=Path, default=Path("runs/interaction"), help="logs and policies")
    parser.add_argument("--workers", type=int, default=2, help="episodes at a time")
    options = parser.parse_args()
    console = Console()
    results = {}
    for source in options.policy or POLICIES:
        results[source] = run(source, options.out, options.workers, console)
        console.print(f"\n{source}\n\n{table(results[source])}\n", markup=False, soft_wrap=True)
    if options.json is not None:
        settings = {"build": build_id(), "seed": SEED, "after_layer": AFTER}
        write_json(options.json, {**settings, "policies": results})


if __name__ == "__main__":
    main()
