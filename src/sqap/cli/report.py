"""``sqap report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqap import environments
from sqap.checkpoints.choices import Choices
from sqap.cli.options import NONE, JsonOption, with_choices, write_numbers
from sqap.terminal import console, progress_bar, user_errors


@with_choices
def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a study, as `sqap ablate` writes it.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: report/index.html in the directory.")
    ] = None,
    episodes: Annotated[
        int, typer.Option(help="Tasks of which the first episode is shown, on video; 0 for none.", min=0)
    ] = 2,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Write the page of a study: one HTML file with charts, tables, pictures, videos and the commands.

    Videos run the baseline and two of the best cells once more, on the study's first episode of a task.
    """
    with user_errors():
        from sqap.report.study import Media, record, write_page
        from sqap.report.study.page import findings, read_study

        study = read_study(directory)
        tasks = study["environment"]["tasks"][:episodes]
        media = Media()
        if tasks:
            environments.check_tasks(study["environment"]["name"], tasks)
            with progress_bar("videos") as advance:
                media = record(study, directory, tasks, choices=choices, progress=advance)
        path = out or directory / "report" / "index.html"
        write_page(study, path, media)
        for sentence in findings(study):
            console.print(sentence, soft_wrap=True)
        console.print(f"The page is {path}", soft_wrap=True)
        write_numbers(json_path, {"page": str(path), "findings": findings(study), "tasks": tasks})
