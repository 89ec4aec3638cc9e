"""The ``sqap`` command line: thin, over the same functions that the library offers."""

from __future__ import annotations

import logging

import typer
from rich.logging import RichHandler

from sqap.cli.bench import bench
from sqap.cli.compress import compress
from sqap.cli.demo import demo
from sqap.cli.evaluate import evaluate_command
from sqap.cli.inspect import inspect
from sqap.cli.sensitivity import sensitivity
from sqap.terminal import console

app = typer.Typer(
    help="Make vision-language-action policies small and fast, and show that they still work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _settings() -> None:
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])


app.command()(compress)
app.command()(sensitivity)
app.command("eval")(evaluate_command)
app.command()(inspect)
app.command()(bench)
app.command()(demo)

__all__ = ["app"]
