"""The ``sqap`` command line: thin, over the same functions that the library offers."""

from __future__ import annotations

from typing import Annotated

import typer

import sqap
from sqap.cli.ablate import ablate
from sqap.cli.bench import bench
from sqap.cli.capacity import capacity
from sqap.cli.compress import compress
from sqap.cli.demo import demo
from sqap.cli.evaluate import evaluate_command
from sqap.cli.inspect import inspect
from sqap.cli.replay import replay
from sqap.cli.report import report
from sqap.cli.sensitivity import sensitivity
from sqap.cli.serve import serve
from sqap.cli.tune import tune
from sqap.terminal import console, set_up

app = typer.Typer(
    help="Make vision-language-action policies small and fast, and show that they still work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"sqap {sqap.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _settings(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what is done, and where an error was found.")
    ] = False,
) -> None:
    set_up(verbose)


app.command()(compress)
app.command()(sensitivity)
app.command()(tune)
app.command("eval")(evaluate_command)
app.command()(report)
app.command()(replay)
app.command()(ablate)
app.command()(inspect)
app.command()(bench)
app.command()(serve)
app.command()(capacity)
app.command()(demo)

__all__ = ["app"]
