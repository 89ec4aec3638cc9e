"""What the commands share: two consoles, progress, and errors that are one sentence.

Results go to stdout; progress, warnings and errors go to stderr. Neither console reads markup, so that the
brackets of a path or of ``sqap[sim]`` are printed as they are.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sqap.errors import SqapError

Advance = Callable[[int, int], None]

LINE_SECONDS = 10.0  # between two lines of progress, where there is no terminal

console = Console(markup=False, emoji=False)
messages = Console(stderr=True, markup=False, emoji=False)
logger = logging.getLogger("sqap")


def set_up(verbose: bool) -> None:
    """Prepare a command's output: what is logged, and what the locale's encoding has no character for."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        logger.addHandler(RichHandler(console=messages, show_path=False, show_time=False))
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake is one sentence and exit code 1; Ctrl-C is 130 and leaves what there is."""
    try:
        yield
    except SqapError as error:
        logger.debug("where the error was found:", exc_info=True)
        messages.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        messages.print("interrupted; the same command goes on from what is finished", soft_wrap=True)
        raise typer.Exit(130) from None


@contextmanager
def progress_bar(what: str, *, percent: bool = False) -> Iterator[Advance]:
    """Progress that counts, or shows the share that is done; yields ``advance(done, total)``.

    A bar where stderr is a terminal, and plain lines where it is not.
    """
    if not sys.stderr.isatty() or messages.is_dumb_terminal:
        yield _Lines(what, percent)
        return
    count = TaskProgressColumn() if percent else MofNCompleteColumn()
    columns = (TextColumn(what, markup=False), BarColumn(), count, TimeRemainingColumn())
    # A redirected stdout is the user's file, in which the bar's console has no business.
    to_screen = sys.stdout.isatty()
    with Progress(*columns, console=messages, transient=True, redirect_stdout=to_screen) as progress:
        bar = progress.add_task(what)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


class _Lines:
    """Progress as lines of text: one at the start, one at the end, and one every `LINE_SECONDS` in between.

    Args:
        what: is being done.
        percent: show the share that is done instead of the count.
    """

    def __init__(self, what: str, percent: bool) -> None:
        self._what = what
        self._percent = percent
        self._first: tuple[float, int] | None = None  # seconds, done
        self._print("started")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._first = self._first or (now, done)
        if done >= total or now >= self._printed + LINE_SECONDS:
            share = f"{100 * done / max(total, 1):.0f} %" if self._percent else f"{done} of {total}"
            self._print(share + _left(now - self._first[0], done - self._first[1], total - done))

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        messages.print(f"{self._what}: {text}", soft_wrap=True, highlight=False)


def _left(seconds: float, done: int, remaining: int) -> str:
    """The time left in words, where so much was done in so many seconds."""
    if done <= 0 or remaining <= 0:
        return ""
    minutes = round(seconds * remaining / done / 60)
    return f" ({minutes} min left)" if minutes else " (less than a minute left)"
