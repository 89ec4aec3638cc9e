"""How the presets' mix of pruning criteria was chosen: python benchmarks/choose_mix.py

W4A8 at one budget, on development seeds that no reported number uses.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from variants import compare, describe, run_variants

from sqap.recipe import Pruning, Quantization, Recipe, Scheme

SEED = 200_000


def recipes(keep: float) -> dict[str, Recipe]:
    """Name -> recipe: the baselines, each share by itself, and mixes of them."""
    both, mix = (0, 1), partial(Pruning, keep, method="sqap")
    settings = {
        "random": Pruning(keep, method="random"),
        "attention": Pruning(keep, method="attention"),
        "attention of the last token": Pruning(keep, method="attention", score_queries="last"),
        "farthest points": mix(top_share=0.0, ring_share=0.0),
        "paper": mix(),
        "top 0.25": mix(score_layers=both, top_share=0.25, ring_share=0.0),
        "top 0.25, ring 0.1": mix(score_layers=both, top_share=0.25, ring_share=0.1),
        "top 0.4, ring 0.2": mix(score_layers=both, top_share=0.4, ring_share=0.2),
        "random after 3": Pruning(keep, 3, method="random"),
        "attention after 3": Pruning(keep, 3, method="attention", score_layers=(0, 1, 2)),
        "top 0.25, ring 0.1 after 3": mix(
            after_layer=3, score_layers=(0, 1, 2), top_share=0.25, ring_share=0.1
        ),
    }
    return {"full": Recipe()} | {name: Recipe(Quantization(Scheme(4, 8)), p) for name, p in settings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="reference")
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--episodes", type=int, default=10, help="per task")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/choose_mix"))
    args = parser.parse_args()
    chosen = recipes(args.keep)
    episodes = dict.fromkeys(chosen, args.episodes)
    out = args.out / f"{args.keep}"
    runs = run_variants(args.policy, chosen, episodes=episodes, seed=SEED, out=out, workers=args.workers)
    print("| variant | success | wins : losses against full | against random |\n|---|---|---|---|")
    for name, run in runs.items():
        full, random = compare(run, runs["full"]), compare(run, runs["random"])
        versus = [f"{pair['wins']} : {pair['losses']}" for pair in (full, random)]
        print(f"| {name} | {100 * describe(run)['success']:.1f} | {versus[0]} | {versus[1]} |")


if __name__ == "__main__":
    main()
