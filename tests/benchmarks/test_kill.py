"""A few of the kills of ``benchmarks/kill.py``; docs/kill.md has fifty of each command."""

from __future__ import annotations

import random
from pathlib import Path

import kill
from rich.console import Console


def test_a_compression_that_was_killed_ends_as_if_undisturbed(tmp_path: Path) -> None:
    outcome = kill.torment(kill.compressing(tmp_path), 3, random.Random(1), Console(quiet=True))
    assert outcome.kills == 3
    assert outcome.equal == outcome.finals > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
