"""`sqap eval` from end to end, worker processes included; only policy and simulator are fakes."""

import json
from functools import partial

import evaluation_fakes as fakes
import pytest
from typer.testing import CliRunner

from sqap.cli import app
from sqap.evaluation import executors
from sqap.evaluation.worker import WARMUP_CALLS


@pytest.fixture
def command(saved, tmp_path, monkeypatch):
    """``command(*options)``: exit code and output of an evaluation of one episode."""
    monkeypatch.chdir(tmp_path)
    with_fakes = partial(executors.evaluate, load=fakes.load_walker, make=fakes.make)
    monkeypatch.setattr(executors, "evaluate", with_fakes)

    def run(*options):
        arguments = ["eval", saved, "--tasks", "door-open", "--episodes", 1, "--seed", 10, *options]
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        return result.exit_code, " ".join(result.output.split())

    return run


def test_the_ensemble_reaches_the_episodes_the_log_and_the_summary(command, tmp_path):
    assert command("--ensemble", 3, "--json", "e.json")[0] == 0
    assert json.loads((tmp_path / "e.json").read_text())["ensemble"] == 3
    (log,) = (tmp_path / "runs").iterdir()
    assert log.name.endswith("-workers1-ensemble3.jsonl")
    line = json.loads(log.read_text())
    assert line["settings"]["ensemble"] == 3
    assert len(line["episode"]["latencies_ms"]) == line["episode"]["steps"] - WARMUP_CALLS
    code, output = command("--log", log)
    assert code == 1
    assert "was written with ensemble=3, now it is None" in output


def test_an_ensemble_larger_than_a_chunk_is_one_sentence(command):
    code, output = command("--ensemble", fakes.HORIZON + 1)
    assert code == 1
    assert f"an ensemble must be of 1 to {fakes.HORIZON} chunks" in output
    assert "Traceback" not in output


def test_without_an_ensemble_the_log_is_named_as_ever(command, tmp_path):
    assert command()[0] == 0
    (log,) = (tmp_path / "runs").iterdir()
    assert log.name.endswith("-workers1.jsonl")
    assert json.loads(log.read_text())["settings"]["ensemble"] is None
