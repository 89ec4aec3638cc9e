"""What the quantizer is worth, on the robot: python benchmarks/quantizer.py --json docs/quantizer.json

For each bundled policy: full precision; W4A8 of the whole policy, without and with the blocks that cost most
at 8 bits, as many as fit into a budget; W4A4 of the decoder by the method, and rounded to nearest without
rotation. All on the same seeds with the same diffusion noise, and replayed on calibration frames for the
action error in millimetres. Nothing is pruned. Interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from variants import ENV, FRAMES, compare, decoder_alone, describe, run_variants

import sqap
from sqap import environments
from sqap.budget import fit
from sqap.files import write_json
from sqap.frames import collect_frames
from sqap.models.storage import stored_bytes
from sqap.recipe import Quantization, Recipe, Scheme
from sqap.sensitivity import Replay

SEED = 1_000_000
POLICIES = ("reference", "reference-smollm")
BUDGET = 0.32  # of the bytes in bfloat16


def recipes(replay: Replay) -> dict[str, Recipe]:
    """Name -> recipe, in the order of the table."""
    w4a8 = Recipe.w4a8(keep=1).quantization
    assert w4a8 is not None
    # A quarter of the frames is enough to rank blocks.
    ranking = dataclasses.replace(replay, frames=replay.frames[::4])
    budget = round(BUDGET * stored_bytes(replay.policy.model))
    return {
        "full": Recipe(),
        "w4a8-whole": Recipe(w4a8),
        "w4a8-budget": Recipe(fit(ranking, w4a8, target_bytes=budget)),
        "w4a4-decoder": Recipe(decoder_alone(Recipe.w4a4(keep=1))),
        "w4a4-decoder-rtn": Recipe(Quantization(Scheme(4, 4), rotate=False)),
    }


def run(source: str, episodes: int, workers: int, out: Path, console: Console) -> dict[str, Any]:
    """Everything about one policy."""
    policy = sqap.load(source)
    frames = collect_frames(policy, ENV, environments.default_tasks(ENV), FRAMES)
    replay = Replay(policy, frames, Recipe.w4a8().pruning)
    chosen = recipes(replay)
    runs = run_variants(
        source,
        chosen,
        episodes=dict.fromkeys(chosen, episodes),
        seed=SEED,
        out=out / source,
        workers=workers,
        console=console,
    )
    full_bytes = stored_bytes(policy.model)
    result: dict[str, Any] = {"full": {**describe(runs["full"]), "weight_bytes": full_bytes}}
    for name, recipe in chosen.items():
        if recipe.quantization is None:
            continue
        option = replay.measure(name, recipe.quantization)
        result[name] = {
            **describe(runs[name]),
            "against_full": compare(runs[name], runs["full"]),
            "weight_bytes": option.weight_bytes,
            "bytes_of_full": option.weight_bytes / full_bytes,
            "action_error": dataclasses.asdict(option.error),
            "topk_overlap": option.overlap,
        }
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """The report in Markdown: success in percent, differences in points."""
    lines = [
        "| policy | variant | success | minus full | 95 % interval | wins : losses "
        "| mm a step | flips | bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for policy, rows in results.items():
        for name, row in rows.items():
            cells = [policy, name, f"{100 * row['success']:.1f} of {row['episodes']}"]
            if name == "full":
                cells += ["", "", "", "", "", "100 %"]
            else:
                against, error = row["against_full"], row["action_error"]
                low, high = against["difference_ci95"]
                cells += [
                    f"{100 * against['difference']:+.1f}",
                    f"{100 * low:+.1f} to {100 * high:+.1f}",
                    f"{against['wins']} : {against['losses']}",
                    f"{error['millimetres']:.2f}",
                    f"{100 * error['gripper_flips']:.1f} %",
                    f"{100 * row['bytes_of_full']:.1f} %",
                ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policies", nargs="*", default=POLICIES)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--out", type=Path, default=Path("runs/quantizer"), help="logs and policies")
    parser.add_argument("--episodes", type=int, default=30, help="per task")
    parser.add_argument("--workers", type=int, default=2, help="episodes at a time")
    args = parser.parse_args()
    console = Console()
    results = {p: run(p, args.episodes, args.workers, args.out, console) for p in args.policies}
    print(table(results))
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
