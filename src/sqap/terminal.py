"""What the commands share: a console, progress bars, and errors that are one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from sqap.errors import SqapError

console = Console()


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake is one sentence and exit code 1; Ctrl-C is 130 and leaves what there is."""
    try:
        yield
    except SqapError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on from what is finished")
        raise typer.Exit(130) from None


@contextmanager
def progress_bar(what: str, *, percent: bool = False) -> Iterator[Any]:
    """A progress bar that counts, or shows the share that is done; yields ``advance(done, total)``."""
    count = TaskProgressColumn() if percent else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task(what)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
