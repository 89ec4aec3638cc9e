"""Pruning criteria in closed loop: python benchmarks/pruning.py --json docs/pruning.json

On each bundled policy, W4A8, every criterion keeps a quarter of the visual tokens behind the third decoder
layer: look-ahead and its rivals, all on the same seeds with the same diffusion noise. Unpruned, look-ahead
and random run twice as many episodes, since their differences are the headline; so does look-ahead with 0.4
of the tokens, since the presets keep the fewer of the two whose interval against unpruned stays above -5
points on both policies. Look-ahead with fewer tokens shows how far it goes. Of a policy with an action
expert, whose look-ahead asks the expert's action tokens, ``lookahead-text`` asks the instruction instead, in
as many episodes. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from variants import ENV, FRAMES, compare, describe, run_saved

import sqap
from sqap import environments
from sqap.build import build_id
from sqap.compress import reprune
from sqap.files import write_json
from sqap.frames import collect_frames
from sqap.models import ModelConfig
from sqap.policy import Policy
from sqap.recipe import Pruning, Recipe

SEED = 3_000_000
POLICIES = ("reference", "reference-smollm")
AFTER, KEEP = 3, 0.25
MANY, FEW = 60, 30  # episodes per task
HEADLINE = ("unpruned", "lookahead", "random")
TEXT = "lookahead-text"
LONG = (*HEADLINE, "lookahead-0.4", TEXT)  # these run MANY episodes


def variants(config: ModelConfig) -> dict[str, Pruning | None]:
    """Name -> setting, in the order they run in."""
    table: dict[str, Pruning | None] = {"unpruned": None}
    table["lookahead-0.4"] = Pruning(keep_ratio=0.4, after_layer=AFTER)
    for method in ("lookahead", "random", "attention", "sqap", "uniform", "divprune", "dart", "cdpruner"):
        table[method] = Pruning(keep_ratio=KEEP, after_layer=AFTER, method=method)
    if config.head.has_expert:
        table[TEXT] = Pruning(keep_ratio=KEEP, after_layer=AFTER, score_queries="text")
    for keep in (0.15, 0.1):
        table[f"lookahead-{keep}"] = Pruning(keep_ratio=keep, after_layer=AFTER)
    return table


def run(
    source: str, out: Path, workers: int, console: Console, only: list[str] | None, many: int
) -> dict[str, Any]:
    """Everything about one policy."""
    policy = sqap.load(source)
    frames = collect_frames(policy, ENV, environments.default_tasks(ENV), FRAMES)
    unpruned = sqap.compress(policy, Recipe.w4a8(keep=1), frames)
    known = variants(policy.config.model)
    chosen = {name: pruning for name, pruning in known.items() if only is None or name in only}
    place = out / Path(source).name
    small: dict[str, Policy] = {}

    def directories() -> Iterator[tuple[str, Path]]:
        for name, pruning in chosen.items():
            small[name] = reprune(policy, unpruned, pruning, frames)
            directory = place / "policies" / name
            small[name].save(directory)
            yield name, directory

    episodes = {name: many if name in LONG else min(FEW, many) for name in chosen}
    runs = run_saved(directories(), episodes=episodes, seed=SEED, out=place, workers=workers, console=console)
    result: dict[str, Any] = {}
    for name, run in runs.items():
        calibration = small[name].calibration
        result[name] = {**describe(run), "calibration": calibration and dataclasses.asdict(calibration)}
        for rival in HEADLINE:
            if rival in runs and rival != name:
                result[name][f"against_{rival}"] = compare(run, runs[rival])
    return result


def table(result: dict[str, Any]) -> str:
    """One policy's numbers as a Markdown table: success in percent, paired differences in points."""
    lines = [
        "| criterion | episodes | success | minus unpruned | minus random | minus look-ahead |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        cells = [name, str(row["episodes"]), f"{100 * row['success']:.1f}"]
        cells += [_difference(row.get(f"against_{rival}")) for rival in ("unpruned", "random", "lookahead")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(pair: dict[str, Any] | None) -> str:
    if pair is None:
        return ""
    low, high = (f"{100 * bound:+.1f}" for bound in pair["difference_ci95"])
    counts = f"{pair['wins']}:{pair['losses']}"
    return f"{100 * pair['difference']:+.1f} ({low} to {high}) {counts}, p = {pair['mcnemar_p']:.2g}"


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", action="append", help="one for Meta-World; both bundled ones by default")
    parser.add_argument("--only", action="append", help="a criterion; all by default")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--out", type=Path, default=Path("runs/pruning"), help="logs and policies")
    parser.add_argument("--workers", type=int, default=2, help="episodes at a time")
    parser.add_argument("--episodes", type=int, default=MANY, help="per task, of the headline's criteria")
    options = parser.parse_args()
    console = Console()
    results = {}
    for source in options.policy or POLICIES:
        results[source] = run(source, options.out, options.workers, console, options.only, options.episodes)
        console.print(f"\n{source}\n\n{table(results[source])}\n", markup=False, soft_wrap=True)
    if options.json is not None:
        settings = {"build": build_id(), "seed": SEED, "keep_ratio": KEEP, "after_layer": AFTER}
        write_json(options.json, {**settings, "policies": results})


if __name__ == "__main__":
    main()
