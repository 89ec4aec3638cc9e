"""One finished study of a small policy on a simulator that needs nothing, which tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sqap.cli import app
from tests.study import stub
from tests.tiny import tiny_policy

FACTORS = "bits=16,w4a8 keep=1.0,0.5 criteria=lookahead,random after=2"
Ablate = Callable[..., Result]


@pytest.fixture(scope="session")
def small_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy on disk."""
    place = tmp_path_factory.mktemp("study") / "policy"
    tiny_policy().save(place)
    return place


@pytest.fixture(scope="session")
def ablate(small_policy: Path) -> Ablate:
    """``ablate(out, *options)`` runs the command in this process."""

    def run(out: Path, *options: object, factors: str = FACTORS, episodes: int = 3) -> Result:
        arguments = ["ablate", small_policy, "--out", out, "--env", "stub", "--frames", 4, "--yes"]
        arguments += ["--factors", factors, "--episodes", episodes, "--executor", "serial", *options]
        with pytest.MonkeyPatch.context() as patch:
            stub.hurry(patch)
            return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture(scope="session")
def finished(ablate: Ablate, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A study's directory, and what the command said."""
    out = tmp_path_factory.mktemp("finished") / "study"
    result = ablate(out)
    assert result.exit_code == 0, result.output
    return out, result
