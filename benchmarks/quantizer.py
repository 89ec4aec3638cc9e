"""What the quantizer is worth, on the robot: python benchmarks/quantizer.py --json docs/quantizer.json

    python benchmarks/quantizer.py --correction --json docs/correction.json

For each bundled policy: full precision; W4A8 of the whole policy, without and with the blocks that cost most
at 8 bits, as many as fit into a budget; W4A4 of the decoder by the method, and rounded to nearest without
rotation. All on the same seeds with the same diffusion noise, and replayed on calibration frames for the
action error in millimetres. Nothing is pruned. Interrupted, it goes on.

With ``--correction``: W4A8 of the whole policy and W4A4 of the decoder, each as the preset has it and with
two values of ``correction``, on seeds that chose nothing; compared with full precision and with the preset,
and replayed on frames that no policy was calibrated on.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from variants import ENV, FRAMES, compare, decoder_alone, describe, run_variants

import sqap
from sqap import environments
from sqap.budget import fit
from sqap.files import write_json
from sqap.frames import collect_frames
from sqap.models.storage import stored_bytes
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.recipe import Quantization, Recipe, Scheme
from sqap.sensitivity import Replay, action_error

SEED = 1_000_000
CORRECTION_SEED = 5_000_000
UNSEEN_SEED = 520_000  # of frames that nothing is calibrated on
CORRECTIONS = (0.25, 0.5)
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


def corrected_recipes() -> dict[str, Recipe]:
    """Name -> recipe; ``PRESET+VALUE`` is a preset with that correction."""
    w4a8 = Recipe.w4a8(keep=1).quantization
    assert w4a8 is not None
    recipes = {"full": Recipe()}
    for name, preset in {"w4a8-whole": w4a8, "w4a4-decoder": decoder_alone(Recipe.w4a4(keep=1))}.items():
        for value in (0.0, *CORRECTIONS):
            variant = f"{name}+{value:g}" if value else name
            recipes[variant] = Recipe(dataclasses.replace(preset, correction=value))
    return recipes


def run_corrected(source: str, episodes: int, workers: int, out: Path, console: Console) -> dict[str, Any]:
    """Everything about one policy with and without ``correction``."""
    recipes = corrected_recipes()
    runs = run_variants(
        source,
        recipes,
        episodes=dict.fromkeys(recipes, episodes),
        seed=CORRECTION_SEED,
        out=out / source,
        workers=workers,
        console=console,
    )
    policy = sqap.load(source)
    unseen = collect_frames(policy, ENV, environments.default_tasks(ENV), FRAMES, seed=UNSEEN_SEED)
    originals, full_bytes = _act(policy, unseen), stored_bytes(policy.model)
    result: dict[str, Any] = {"full": {**describe(runs["full"]), "weight_bytes": full_bytes}}
    for name in list(recipes)[1:]:
        small = sqap.load(out / source / "policies" / name)
        preset = name.partition("+")[0]
        result[name] = {
            **describe(runs[name]),
            "against_full": compare(runs[name], runs["full"]),
            "against_preset": compare(runs[name], runs[preset]) if name != preset else None,
            "weight_bytes": stored_bytes(small.model),
            "bytes_of_full": stored_bytes(small.model) / full_bytes,
            "action_error": dataclasses.asdict(action_error(originals, _act(small, unseen), policy.config)),
        }
    return result


def _act(policy: Policy, frames: Sequence[Observation]) -> np.ndarray:
    return np.stack([policy.act(frame, seed=seed) for seed, frame in enumerate(frames)])


def corrected_table(results: dict[str, dict[str, Any]]) -> str:
    """As `table`, with the differences from the preset."""
    lines = [
        "| policy | variant | success | minus full | wins : losses "
        "| minus preset | wins : losses | mm a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for policy, rows in results.items():
        for name, row in rows.items():
            cells = [policy, name, f"{100 * row['success']:.1f} of {row['episodes']}"]
            for rival in ("against_full", "against_preset"):
                if (against := row.get(rival)) is None:
                    cells += ["", ""]
                    continue
                difference, low, high = (
                    100 * x for x in (against["difference"], *against["difference_ci95"])
                )
                cells += [
                    f"{difference:+.1f} ({low:+.1f} to {high:+.1f})",
                    f"{against['wins']} : {against['losses']}",
                ]
            cells.append("" if name == "full" else f"{row['action_error']['millimetres']:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    parser.add_argument("--correction", action="store_true", help="the presets with and without it")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--out", type=Path, default=Path("runs/quantizer"), help="logs and policies")
    parser.add_argument("--episodes", type=int, default=30, help="per task")
    parser.add_argument("--workers", type=int, default=2, help="episodes at a time")
    args = parser.parse_args()
    console = Console()
    measure, show = (run_corrected, corrected_table) if args.correction else (run, table)
    results = {p: measure(p, args.episodes, args.workers, args.out, console) for p in args.policies}
    print(show(results))
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
