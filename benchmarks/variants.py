"""Compress one policy in several ways and run them all on the same episodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import sqap
from sqap import environments
from sqap.checkpoints import fingerprint, locate
from sqap.evaluation.executors import Run, evaluate
from sqap.evaluation.settings import current_settings
from sqap.evaluation.statistics import mcnemar_exact, paired_difference, wilson
from sqap.frames.simulator import collect_frames
from sqap.recipe import Quantization, Recipe

ENV = "metaworld"
FRAMES = 48


def decoder_alone(preset: Recipe) -> Quantization:
    """What a preset does to the decoder, and nothing to the other parts."""
    assert preset.quantization is not None
    return replace(preset.quantization, vision=None, projector=None, head=None, overrides=())


def run_variants(
    source: str,
    recipes: Mapping[str, Recipe],
    *,
    episodes: Mapping[str, int],
    seed: int,
    out: Path,
    workers: int = 2,
    tasks: Sequence[str] | None = None,
    console: Console | None = None,
) -> dict[str, Run]:
    """Evaluate every recipe on ``source``, one after the other; interrupted, it goes on where it was.

    Variants share seeds and diffusion noise, so any two can be compared in pairs.

    Args:
        source: the uncompressed policy.
        recipes: name -> recipe; an empty recipe is the policy itself.
        episodes: name -> episodes per task.
        seed: of each task's first episode.
        out: directory for the compressed policies and the episode logs.
        workers: episodes at a time; latencies are not read from these runs.
        tasks: the environment's usual ones if not given.
        console: where progress is shown.
    """
    tasks = tasks or environments.default_tasks(ENV)
    policy = sqap.load(source)
    frames = collect_frames(policy, ENV, tasks, FRAMES)

    def directories() -> Iterator[tuple[str, Path]]:
        for name, recipe in recipes.items():
            directory = locate(source)
            if recipe != Recipe():
                directory = out / "policies" / name
                sqap.compress(policy, recipe, frames).save(directory)
            yield name, directory

    return run_saved(
        directories(), episodes=episodes, seed=seed, out=out, workers=workers, tasks=tasks, console=console
    )


def run_saved(
    directories: Iterable[tuple[str, Path]],
    *,
    episodes: Mapping[str, int],
    seed: int,
    out: Path,
    workers: int = 2,
    tasks: Sequence[str] | None = None,
    console: Console | None = None,
) -> dict[str, Run]:
    """As `run_variants`, for policies that are on disk: pairs of a name and a directory."""
    tasks = tasks or environments.default_tasks(ENV)
    settings = current_settings(ENV, workers=workers, threads=1)
    runs: dict[str, Run] = {}
    with Progress(console=console) as progress:
        for name, directory in directories:
            mark = fingerprint(directory)
            bar = progress.add_task(name, total=episodes[name] * len(tasks))
            (runs[name],) = evaluate(
                [directory],
                ENV,
                tasks,
                episodes[name],
                seed,
                fingerprints=[mark],
                log=out / "episodes" / f"{name}-{mark[:12]}-{settings.mark}.jsonl",
                workers=workers,
                threads=1,
                progress=lambda _, done, total, bar=bar: progress.update(bar, completed=done),
            )
    return runs


def outcomes(run: Run) -> dict[tuple[str, int], bool]:
    """(task, seed) -> success."""
    return {(r.episode.task, r.episode.seed): r.episode.success for r in run.records}


def describe(run: Run) -> dict[str, Any]:
    """Successes with their 95 % Wilson interval."""
    won = list(outcomes(run).values())
    return {
        "episodes": len(won),
        "success": sum(won) / len(won),
        "success_ci95": list(wilson(sum(won), len(won))),
    }


def compare(run: Run, rival: Run) -> dict[str, Any]:
    """Paired difference ``run`` minus ``rival`` on the episodes both have run."""
    a, b = outcomes(run), outcomes(rival)
    shared = [key for key in a if key in b]
    difference, low, high = paired_difference([a[k] for k in shared], [b[k] for k in shared])
    wins = sum(a[k] and not b[k] for k in shared)
    losses = sum(b[k] and not a[k] for k in shared)
    return {
        "episodes": len(shared),
        "difference": difference,
        "difference_ci95": [low, high],
        "wins": wins,
        "losses": losses,
        "mcnemar_p": mcnemar_exact(wins, losses),
    }
