"""``sqap bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqap.checkpoints.choices import Choices
from sqap.cli.options import (
    NONE,
    SOURCE,
    JsonOption,
    KeepOption,
    RecipeOption,
    read_recipe,
    with_choices,
    write_numbers,
)
from sqap.errors import InputError
from sqap.report import tables
from sqap.terminal import console, progress_bar, user_errors


@with_choices
def bench(
    source: Annotated[str | None, SOURCE] = None,
    shape: Annotated[str | None, typer.Option(help="A published size, with random weights.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Decoder layers of the shape, if not all of them.", min=1)
    ] = None,
    recipe: RecipeOption = "w4a8",
    keep: KeepOption = None,
    vs: Annotated[str, typer.Option(help="Rivals, comma-separated.")] = "torch-fp32,torch-bf16",
    steps: Annotated[
        int | None, typer.Option(help="Timed steps of each: 30, or 200 on a GPU.", min=1)
    ] = None,
    warmups: Annotated[int, typer.Option(help="Steps of each that come before.", min=0)] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads of each; all cores if not given.")] = None,
    one_at_a_time: Annotated[
        bool, typer.Option(help="Keep one candidate in memory: they take turns in thirds.")
    ] = False,
    environments: Annotated[
        Path | None, typer.Option(help="Folder of virtual environments of the rivals, see docs/bench.md.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to time them: cpu or cuda.")] = "cpu",
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Time a step of a policy beside other forms of it, on this machine."""
    with user_errors():
        from sqap.benchmark import Subject
        from sqap.benchmark import bench as run

        if (source is None) == (shape is None):
            raise InputError("name a policy to time, or a --shape; one of the two")
        if shape is not None and choices != NONE:
            raise InputError("a --shape has random weights: how published ones are read is no choice there")
        settings = read_recipe(recipe, keep)
        subject = Subject(shape or str(source), settings, shape is not None, layers, choices, device)
        rivals = [name for name in vs.split(",") if name]
        with progress_bar("steps") as advance:
            report = run(
                subject,
                rivals,
                steps=steps,
                warmups=warmups,
                threads=threads,
                one_at_a_time=one_at_a_time,
                environments=environments,
                progress=advance,
            )
        for table in tables.bench_tables(report):
            console.print(table)
        write_numbers(json_path, report)
