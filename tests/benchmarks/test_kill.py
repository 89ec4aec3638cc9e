"""A few of the kills of ``benchmarks/kill.py``; docs/kill.md has fifty of each command."""

from __future__ import annotations

import dataclasses
import random
import signal
import time
from pathlib import Path

import kill
from rich.console import Console


def test_a_compression_that_was_killed_ends_as_if_undisturbed(tmp_path: Path) -> None:
    outcome = kill.torment(kill.compressing(tmp_path), 3, random.Random(1), Console(quiet=True))
    assert outcome.kills == 3
    assert outcome.equal == outcome.finals > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# `sqap` with a policy and a simulator that need next to nothing; worker processes import them by name.
SQAP_ON_FAKES = f"""
import sys
from functools import partial
sys.path.insert(0, {str(Path(__file__).parents[1] / "evaluation")!r})
import evaluation_fakes as fakes
from sqap.cli import app
from sqap.evaluation import executors
executors.evaluate = partial(executors.evaluate, load=fakes.load_stroller, make=fakes.make)
app()
"""


def test_an_evaluation_that_was_killed_goes_on_and_ends_as_if_undisturbed(
    saved: Path, tmp_path: Path
) -> None:
    command = kill.evaluating(tmp_path)
    log = command.begun
    asked = ["eval", str(saved), "--tasks", "door-open,door-close", "--episodes", "4", "--log", str(log)]
    command = dataclasses.replace(command, arguments=asked, program=("-c", SQAP_ON_FAKES))
    kill.finish(kill.start(command))
    wanted = command.result()
    assert len(wanted) == 8
    command.clear()
    kept = b""
    for episodes in (1, 3):
        process = kill.start(command)
        while command.progress() < episodes and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
        assert log.read_bytes().startswith(kept)
        kept = log.read_bytes().rpartition(b"\n")[0]
    kill.finish(kill.start(command))
    assert log.read_bytes().startswith(kept)
    assert command.result() == wanted
