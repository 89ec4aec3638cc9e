"""Does quantizing cost more under pruning? python benchmarks/interaction.py --json docs/interaction.json

The paper claims that quantization spoils the attention that pruning ranks by, and that its method repairs
that. Each bundled policy runs in full precision, W4A8, W4A4 by the method and W4A4 rounded to nearest; each
of these without pruning, and with four criteria at three budgets behind the third decoder layer: 52 cells on
the same seeds with the same diffusion noise. The interaction is the cost of quantizing a pruned policy minus
the cost of quantizing the unpruned one, for each cell and, the primary figure, as the mean over a criterion's
three budgets. Its 95 % interval is a bootstrap over tasks. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
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
CONTRASTS = ("w4a8", "full"), ("w4a4", "full"), ("w4a4-rtn", "full"), ("w4a4", "w4a4-rtn")
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
                result[name][cell]["interaction"] = interaction(won["full"], won[name], [cell])
    result["interactions"] = {
        f"{name} minus {base}": {
            method: interaction(won[base], won[name], [f"{method}-{keep}" for keep in KEEPS])
            for method in METHODS
        }
        for name, base in CONTRASTS
    }
    return result


def interaction(
    base: Mapping[str, Success], quantized: Mapping[str, Success], cells: Sequence[str]
) -> dict[str, Any]:
    """``quantized`` minus ``base`` in pruned ``cells``, minus the same difference without pruning.

    The mean over cells and episodes, with a 95 % bootstrap over tasks. Negative where quantization and
    pruning together lose more than the sum of their separate losses.
    """
    by_task: dict[str, list[int]] = {}
    for cell in cells:
        for key in base[cell]:
            pruned = int(quantized[cell][key]) - int(base[cell][key])
            alone = int(quantized["unpruned"][key]) - int(base["unpruned"][key])
            by_task.setdefault(key[0], []).append(pruned - alone)
    means = np.array([np.mean(values) for values in by_task.values()])
    drawn = np.random.default_rng(0).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.quantile(means[drawn].mean(1), (0.025, 0.975))
    return {"difference": float(means.mean()), "ci95": [float(low), float(high)]}


def table(result: Mapping[str, Any]) -> str:
    """One policy's success in percent, and each cell's interaction in points."""
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


def contrasts(result: Mapping[str, Any]) -> str:
    """One policy's interactions in points, each the mean over a criterion's three budgets."""
    lines = ["| interaction | " + " | ".join(METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    for name, row in result["interactions"].items():
        cells = []
        for method in METHODS:
            low, high = (f"{100 * bound:+.1f}" for bound in row[method]["ci95"])
            cells.append(f"{100 * row[method]['difference']:+.1f} ({low} to {high})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Success against the share of tokens kept: a row for each policy, a column for each criterion."""
    figure, axes = plt.subplots(
        len(results), len(METHODS), figsize=(12, 3 * len(results)), sharex=True, sharey="row", squeeze=False
    )
    for row, (source, result) in zip(axes, results.items(), strict=True):
        for axis, method in zip(row, METHODS, strict=True):
            for shift, name in enumerate(QUANTIZATIONS):
                cells = [result[name]["unpruned"], *(result[name][f"{method}-{keep}"] for keep in KEEPS)]
                success = np.array([100 * cell["success"] for cell in cells])
                bounds = 100 * np.array([cell["success_ci95"] for cell in cells]).T
                errors = np.abs(bounds - success)
                at = np.arange(len(cells)) + 0.06 * (shift - 1.5)  # beside each other, not on top
                axis.errorbar(
                    at, success, errors, label=name, marker="o", markersize=4, linewidth=1.2, capsize=2
                )
            axis.set_title(f"{source}: {method}", fontsize=10)
            axis.set_xticks(range(len(KEEPS) + 1), ["1", *map(str, KEEPS)])
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("share of visual tokens kept")
    for row in axes:
        row[0].set_ylabel("success, %")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", action="append", help="one of the bundled ones; both by default")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--plot", type=Path, help="draw success against keep here, as PNG")
    parser.add_argument("--out", type=Path, default=Path("runs/interaction"), help="logs and policies")
    parser.add_argument("--workers", type=int, default=2, help="episodes at a time")
    options = parser.parse_args()
    console = Console()
    results = {}
    for source in options.policy or POLICIES:
        results[source] = run(source, options.out, options.workers, console)
        tables = f"{table(results[source])}\n\n{contrasts(results[source])}"
        console.print(f"\n{source}\n\n{tables}\n", markup=False, soft_wrap=True)
    if options.plot is not None:
        plot(results, options.plot)
    if options.json is not None:
        settings = {"build": build_id(), "seed": SEED, "after_layer": AFTER}
        write_json(options.json, {**settings, "policies": results})


if __name__ == "__main__":
    main()
