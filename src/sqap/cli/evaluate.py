"""``sqap eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sqap
from sqap import environments
from sqap.checkpoints import fingerprint, locate
from sqap.cli.options import JsonOption, write_numbers
from sqap.errors import InputError
from sqap.report import tables
from sqap.terminal import console, progress_bar, user_errors


def evaluate_command(
    policy: Annotated[str, typer.Argument(help="Directory of a policy, or 'reference'.")],
    env: Annotated[str, typer.Option(help="Simulator.")] = "metaworld",
    tasks: Annotated[str | None, typer.Option(help="Comma-separated; default: the env's usual.")] = None,
    episodes: Annotated[int, typer.Option(help="Episodes per task.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of each task's first episode.", min=0)] = 1_000_000,
    against: Annotated[str | None, typer.Option(help="Policy to compare with, in pairs.")] = None,
    ensemble: Annotated[int | None, typer.Option(help="Look every step, average so many chunks.")] = None,
    video: Annotated[Path | None, typer.Option(help="Directory for one video per task.")] = None,
    log: Annotated[Path | None, typer.Option(help="Episode log; an interrupted run resumes from it.")] = None,
    workers: Annotated[int, typer.Option(help="Episodes at a time; read latency at 1.", min=1)] = 1,
    json_path: JsonOption = None,
) -> None:
    """Run a policy in closed loop and report success with intervals, latency and memory."""
    with user_errors():
        from sqap.evaluation.executors import evaluate
        from sqap.evaluation.summary import summarize

        if ensemble is not None and video is not None:
            raise InputError("videos show whole chunks executed; leave out --video or --ensemble")
        chosen = tuple(tasks.split(",")) if tasks else environments.default_tasks(env)
        policies = [policy] if against is None else [policy, against]
        fingerprints = [fingerprint(locate(p)) for p in policies]
        log = log or _default_log(fingerprints, env, workers, ensemble)
        with progress_bar("episodes") as advance:
            runs = evaluate(
                policies,
                env,
                chosen,
                episodes,
                seed,
                fingerprints=fingerprints,
                ensemble=ensemble,
                log=log,
                workers=workers,
                progress=lambda _, done, total: advance(done, total),
            )
        summary = summarize(*runs)
        shown = [(policy, summary)] + ([(against, summary["against"])] if against else [])
        console.print(tables.success_table(shown), tables.cost_table(shown))
        if against is not None:
            console.print(tables.paired_line(summary["against"]), soft_wrap=True)
        console.print(f"Episodes are in {log}", soft_wrap=True)
        if video is not None:
            from sqap.report.comparison import record_comparison
            from sqap.report.video import write_video

            with progress_bar("videos") as advance:
                columns = record_comparison([sqap.load(p) for p in policies], env, chosen, seed, advance)
            for i, task in enumerate(chosen):
                write_video(video / f"{task}.mp4", [[clips[i]] for clips in columns])
            console.print(f"Videos are in {video}", soft_wrap=True)
        write_numbers(json_path, summary)


def _default_log(fingerprints: list[str], env: str, workers: int, ensemble: int | None) -> Path:
    policies = "-".join(mark[:12] for mark in fingerprints)
    averaged = "" if ensemble is None else f"-ensemble{ensemble}"
    return Path("runs") / f"{env}-{policies}-workers{workers}{averaged}.jsonl"
