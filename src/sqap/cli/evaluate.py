"""``sqap eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqap.checkpoints import fingerprint, locate
from sqap.checkpoints.card import add_measurement
from sqap.checkpoints.choices import Choices
from sqap.cli.options import (
    NONE,
    EnvOption,
    JsonOption,
    SimPythonOption,
    SourceArgument,
    TasksOption,
    check_card,
    choices_of_each,
    chosen_tasks,
    load_policy,
    with_choices,
    write_numbers,
)
from sqap.errors import InputError
from sqap.report import tables
from sqap.report.evidence import paired_success
from sqap.terminal import console, messages, progress_bar, user_errors

RUNS = Path("runs")


@with_choices
def evaluate_command(
    policy: SourceArgument,
    env: EnvOption = "metaworld",
    sim_python: SimPythonOption = None,
    tasks: TasksOption = None,
    episodes: Annotated[int, typer.Option(help="Episodes per task.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of each task's first episode.", min=0)] = 1_000_000,
    against: Annotated[str | None, typer.Option(help="Policy to compare with, in pairs.")] = None,
    ensemble: Annotated[int | None, typer.Option(help="Look every step, average so many chunks.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the comparison into POLICY's model card, README.md.")
    ] = False,
    video: Annotated[Path | None, typer.Option(help="Directory for one video per task.")] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="Episode log; an interrupted run resumes from it. By default one in runs/ for these "
            "policies, settings, simulator, processor and build of sqap."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Episodes at a time; read latency at 1.", min=1)] = 1,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Run a policy in closed loop and report success with intervals, latency and memory.

    Episodes that are in the log are not run again. A log that another build of sqap, simulator or processor
    has written is refused. Options that say how a policy is read (--unnorm-key and those after it) are for
    published ones, POLICY or --against.
    """
    with user_errors():
        from sqap.evaluation.executors import evaluate
        from sqap.evaluation.log import log_name, unused_logs
        from sqap.evaluation.settings import current_settings
        from sqap.evaluation.summary import from_log_line, summarize

        if ensemble is not None and video is not None:
            raise InputError("videos show whole chunks executed; leave out --video or --ensemble")
        chosen = chosen_tasks(env, tasks)
        policies = [policy] if against is None else [policy, against]
        directories = [locate(p) for p in policies]
        if card:
            check_card(directories)
        each = choices_of_each(directories, choices)
        with progress_bar("reading weights", percent=True) as advance:
            fingerprints = [fingerprint(d, c, advance) for d, c in zip(directories, each, strict=True)]
        if log is None:
            settings = current_settings(env, workers=workers, ensemble=ensemble, choices=each)
            log = RUNS / log_name(settings, fingerprints)
            if others := unused_logs(RUNS, settings, fingerprints):
                names = ", ".join(map(str, others))
                messages.print(
                    f"of another build, simulator or processor, and not used: {names}", soft_wrap=True
                )
        with progress_bar("episodes") as advance:
            runs = evaluate(
                policies,
                env,
                chosen,
                episodes,
                seed,
                fingerprints=fingerprints,
                choices=each,
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
        if (reused := from_log_line(*runs)) is not None:
            console.print(reused, soft_wrap=True)
        console.print(f"Episodes are in {log}", soft_wrap=True)
        if card:
            add_measurement(directories[0], *paired_success(summary))
        if video is not None:
            from sqap.report.comparison import record_comparison
            from sqap.report.video import write_video

            loaded = [load_policy(p, c) for p, c in zip(policies, each, strict=True)]
            with progress_bar("videos") as advance:
                columns = record_comparison(loaded, env, chosen, seed, advance)
            for i, task in enumerate(chosen):
                write_video(video / f"{task}.mp4", [[clips[i]] for clips in columns])
            console.print(f"Videos are in {video}", soft_wrap=True)
        write_numbers(json_path, summary)
