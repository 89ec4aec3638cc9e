"""``sqap demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqap.cli.options import JsonOption, write_numbers
from sqap.terminal import console, progress_bar, user_errors


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the page, its numbers and the video.")] = Path(
        "demo"
    ),
    episodes: Annotated[int, typer.Option(help="Episodes per task.", min=1)] = 10,
    json_path: JsonOption = None,
) -> None:
    """Compress the bundled policy, run it beside the original, and show what was gained and lost."""
    with user_errors():
        from sqap.demo import run_demo

        report = run_demo(out, episodes, console, progress_bar)
        write_numbers(json_path, report)
