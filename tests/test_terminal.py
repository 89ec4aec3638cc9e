"""What every command prints, where, and how."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
import typer
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

import sqap
from sqap import terminal
from sqap.cli import app
from sqap.errors import InputError
from sqap.terminal import console, progress_bar, user_errors

runner = CliRunner()
# What Rich would take for styles, closing tags and emoji.
NAMES = ["[old]", "[b]small", "[/b]", ":smile:", "sqap[sim]"]


@pytest.mark.parametrize("name", NAMES)
def test_brackets_in_a_path_are_printed_and_not_parsed(name):
    result = runner.invoke(app, ["inspect", f"./{name}"])
    assert result.exit_code == 1
    assert name in result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_brackets_in_text_and_tables_are_printed_and_not_parsed(name, capsys):
    table = Table(title=f"{name} in a title", caption=f"{name} in a caption")
    table.add_column(f"{name} in a header")
    table.add_row(f"{name} in a cell")
    console.print(f"{name} in a line")
    console.print(table)
    printed = capsys.readouterr().out
    for place in ("line", "title", "header", "cell", "caption"):
        assert f"{name} in a {place}" in printed


def test_a_missing_extra_is_named_with_its_brackets(capsys):
    with pytest.raises(typer.Exit), user_errors():
        raise InputError('videos need imageio; pip install "sqap[sim]"')
    assert capsys.readouterr().err == 'error: videos need imageio; pip install "sqap[sim]"\n'


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_character_that_the_terminal_lacks_stops_nothing(encoding, monkeypatch):
    """As with LC_ALL=C, and for a file whose name is not UTF-8."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    terminal.set_up(verbose=False)
    table = Table()
    table.add_row("m/s\N{SUPERSCRIPT THREE}", "\udcff.png")
    console.print(table)
    screen.flush()
    printed = screen.buffer.getvalue().decode(encoding)
    assert ("m/s\\xb3" if encoding == "ascii" else "m/s\N{SUPERSCRIPT THREE}") in printed
    assert "\\udcff.png" in printed


def test_the_version_is_shown():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"sqap {sqap.__version__}\n")


def test_python_can_run_it_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sqap", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"sqap {sqap.__version__}\n"), done.stderr


def test_verbose_says_where_an_error_was_found():
    for arguments, shown in ((["--verbose"], True), (["-v"], True), ([], False)):
        result = runner.invoke(app, [*arguments, "inspect", "./nowhere"])
        assert result.exit_code == 1
        assert ("Traceback" in result.stderr) == shown, arguments
        assert result.stdout == ""


def test_the_log_is_shown_as_it_is_and_not_among_the_results(capsys):
    terminal.set_up(verbose=False)
    logging.getLogger("sqap").info("not asked for")
    logging.getLogger("sqap").warning("layer [0] of [/b]")
    out, err = capsys.readouterr()
    assert "layer [0] of [/b]" in err
    assert "not asked for" not in err
    assert out == ""


@pytest.fixture
def clock(monkeypatch):
    """The time, which stands still unless a test moves it."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_progress_is_lines(clock, capsys):
    with progress_bar("episodes") as advance:
        for done in range(30, 121):  # an interrupted run goes on
            clock[0] += 4
            advance(done, 120)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0] == "episodes: started"
    assert lines[1:3] == ["episodes: 32 of 120 (6 min left)", "episodes: 35 of 120 (6 min left)"]
    assert lines[-2:] == ["episodes: 119 of 120 (less than a minute left)", "episodes: 120 of 120"]
    assert len(lines) == 32
    assert out == "", "results alone are on stdout"


def test_without_a_terminal_progress_may_be_a_share(clock, capsys):
    with progress_bar("quantizing [4 bit]", percent=True) as advance:
        for done in (1, 2, 3, 4):
            clock[0] += 60
            advance(10 * done, 40)
    assert capsys.readouterr().err.splitlines() == [
        "quantizing [4 bit]: started",
        "quantizing [4 bit]: 25 %",
        "quantizing [4 bit]: 50 % (2 min left)",
        "quantizing [4 bit]: 75 % (1 min left)",
        "quantizing [4 bit]: 100 %",
    ]


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "messages", Console(stderr=True, force_interactive=True))
    with progress_bar("episodes") as advance:
        advance(3, 4)
    assert "3/4" in screen.getvalue()
    assert "started" not in screen.getvalue()
