"""``sqap ablate``."""

from __future__ import annotations

import shlex
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from sqap.checkpoints.choices import Choices
from sqap.cli.options import (
    NONE,
    EnvOption,
    FramesOption,
    JsonOption,
    SimPythonOption,
    SourceArgument,
    TasksOption,
    chosen_tasks,
    load_policy,
    with_choices,
    write_numbers,
)
from sqap.cli.report import VideosOption, publish
from sqap.errors import InputError
from sqap.terminal import console, messages, progress_bar, user_errors


@with_choices
def ablate(
    policy: SourceArgument,
    out: Annotated[Path, typer.Option(help="Directory of the study: policies, episodes, study.json.")],
    factors: Annotated[
        str, typer.Option(help='As "bits=16,w4a8 keep=1.0,0.4 criteria=lookahead,random"; docs/ablate.md.')
    ] = "",
    env: EnvOption = "metaworld",
    sim_python: SimPythonOption = None,
    tasks: TasksOption = None,
    episodes: Annotated[int, typer.Option(help="Episodes per task, of each cell.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Seed of each task's first episode.", min=0)] = 4_000_000,
    fraction: Annotated[str, typer.Option(help="Share of the combinations that is run, as 1/2.")] = "1",
    design_seed: Annotated[int, typer.Option(help="Of a fraction that is drawn.", min=0)] = 0,
    executor: Annotated[str, typer.Option(help="serial, processes or ray.")] = "processes",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default: one is started.")] = None,
    workers: Annotated[int, typer.Option(help="Episodes at a time; read latency at 1.", min=1)] = 1,
    frames: FramesOption = 48,
    frames_from: Annotated[
        str | None, typer.Option(help="Where calibration frames come from; default: the simulator.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before episodes are run.")] = False,
    videos: VideosOption = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the design and what it takes.")] = False,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Run a policy compressed in many ways on the same episodes, and say what each factor does.

    The same command, interrupted or killed, goes on where it was. docs/ablate.md has the factors, the
    statistics and the fields of study.json.
    """
    with user_errors():
        from sqap.study import factors as levels
        from sqap.study.design import plan
        from sqap.study.estimate import estimate, sentences
        from sqap.study.request import StudyRequest
        from sqap.study.result import statistics_library
        from sqap.study.run import run_study
        from sqap.study.tables import cells_table, contrasts_table, design_lines, findings

        statistics_library()  # refused now rather than after hours
        chosen = chosen_tasks(env, tasks)
        request = StudyRequest(
            source=policy,
            out=out,
            env=env,
            tasks=chosen,
            episodes=episodes,
            seed=seed,
            executor=executor,
            workers=workers,
            address=address,
            frames=frames,
            frames_from=frames_from or env,
            choices=choices,
            command=shlex.join(["sqap", *sys.argv[1:]]),
        )
        parsed = levels.parse(factors)
        original = load_policy(policy, choices)
        design = plan(parsed, original.config.model, _share(fraction), design_seed)
        for line in design_lines(design):
            console.print(line, soft_wrap=True)
        expected = estimate(request, design, original)
        for line in sentences(expected, request):
            console.print(line, soft_wrap=True)
        if dry_run:
            write_numbers(json_path, expected)
            return
        _ask(expected, yes)
        found = run_study(request, design, original, expected, progress_bar)
        console.print(cells_table(found), contrasts_table(found))
        for line in findings(found):
            console.print(line, soft_wrap=True)
        page = publish(found, out, videos, choices)
        console.print(f"The study is in {out / 'study.json'}, its page is {page}", soft_wrap=True)
        write_numbers(json_path, found)


def _share(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--fraction {text} must be a share such as 1/2") from None


def _ask(expected: dict[str, Any], yes: bool) -> None:
    """Go on only if the user wants it."""
    if yes or expected["episodes"] == expected["from_log"]:
        return
    if not sys.stdin.isatty():
        raise InputError("there is no terminal to ask at; give --yes to run this, or --dry-run to see it")
    if not typer.confirm("Run it?"):
        messages.print("nothing was run")
        raise typer.Exit
