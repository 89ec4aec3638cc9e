"""``sqap report``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sqap import environments
from sqap.checkpoints.choices import Choices
from sqap.cli.options import NONE, JsonOption, with_choices, write_numbers
from sqap.terminal import console, messages, progress_bar, user_errors

VideosOption = Annotated[
    int, typer.Option(help="Tasks whose first episode the page shows, on video; 0 for none.", min=0)
]


@with_choices
def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a study, as `sqap ablate` writes it.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: report/index.html in the directory.")
    ] = None,
    videos: VideosOption = 2,
    steps: Annotated[
        int | None,
        typer.Option(help="Time so many steps of every cell in turns, and show these latencies.", min=1),
    ] = None,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Write the page of a study: one HTML file with charts, tables, pictures, videos and the commands.

    Videos run the baseline and two of the best cells once more, on the study's first episode of a task. With
    --steps nothing else should run on the machine; the times are kept, and later pages show them.
    """
    with user_errors():
        from sqap.report.study.page import findings, read_study
        from sqap.study.steps import time_steps, with_steps

        study = read_study(directory)
        if steps is not None:
            with progress_bar("timing steps") as advance:
                time_steps(study, directory, steps, choices=choices, progress=advance)
        study = with_steps(study, directory)
        path = publish(study, directory, videos, choices, out)
        for sentence in findings(study):
            console.print(sentence, soft_wrap=True)
        console.print(f"The page is {path}", soft_wrap=True)
        write_numbers(json_path, {"page": str(path), "findings": findings(study)})


def publish(
    study: Mapping[str, Any], directory: Path, videos: int, choices: Choices, out: Path | None = None
) -> Path:
    """Write a study's page, without videos where they cannot be made, which is said.

    Args:
        study: what study.json holds.
        directory: the study's.
        videos: tasks that are shown.
        choices: how a published original is read.
        out: where the page is; report/index.html in the directory if None.
    """
    from sqap.report.study import Media, record, write_page

    env, tasks = study["environment"]["name"], study["environment"]["tasks"][:videos]
    media = Media()
    if tasks:
        try:
            environments.check_tasks(env, tasks)
            with progress_bar("videos") as advance:
                media = record(study, directory, tasks, choices=choices, progress=advance)
        except Exception as problem:  # a simulator raises what it likes
            messages.print(f"the page has no videos: {problem}", soft_wrap=True)
    path = out or directory / "report" / "index.html"
    write_page(study, path, media)
    return path
