"""``sqap capacity``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sqap.capacity import Load, StepTimes, plan, planning
from sqap.cli import app
from sqap.errors import InputError
from sqap.serving import Limits


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of what is simulated otherwise."""
    monkeypatch.setattr(planning, "OBSERVATIONS", 250)
    monkeypatch.setattr(planning, "STEPS", 20)


SHORT = StepTimes({1: [0.05], 2: [0.1]})


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["capacity", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def times(tmp_path: Path) -> Path:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"step_ms": {"1": [50.0], "2": [100.0]}}))
    return path


def test_the_fewest_replicas_that_hold_are_found():
    """Each robot takes half of a replica: two of them on one wait for each other now and then, one never."""
    found = plan(Load(6, 10.0, poisson=True), SHORT, Limits(), 0.0505)
    assert found["replicas"] == 6
    assert [row["replicas"] for row in found["rows"]] == [1, 2, 4, 5, 6]
    assert [row["holds"] for row in found["rows"]] == [False] * 4 + [True]
    last = found["rows"][-1]
    assert last["p99_ms"] == pytest.approx(50)
    assert last["p99_ci95_ms"] == pytest.approx([50, 50])
    assert found["rows"][0]["p99_ms"] > 150, "six robots, one after the other"
    assert found["rows"][0]["rate_hz"] < 0.5 * last["rate_hz"], "which slows them down"
    assert found["rows"][0]["utilisation"] == pytest.approx(1, abs=0.01)
    assert plan(Load(6, 10.0, poisson=True), SHORT, Limits(), 0.0505, most=5)["replicas"] is None


def test_an_observation_that_is_not_acted_on_is_never_answered():
    found = plan(Load(2, 50.0, waits=False), SHORT, Limits(), 10.0, most=1)
    (row,) = found["rows"]
    assert row["p99_ms"] is None
    assert row["unanswered"]["superseded"] > 0.5
    assert not row["holds"]


def test_the_same_seed_gives_the_same_plan():
    load = Load(4, 5.0, poisson=True)
    first, again, other = (plan(load, SHORT, Limits(), 0.2, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["rows"] != other["rows"]


def test_a_policy_is_timed_and_its_times_can_be_given_again(saved: Path, tmp_path: Path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    load = "--robots", 2, "--rate-hz", 1, "--p99-ms", 10_000
    code, output = command(saved, *load, "--steps", 2, "--threads", 1, "--json", first)
    assert code == 0
    assert "1 replica holds a p99 of 10000 ms" in output
    found = json.loads(first.read_text())
    assert set(found["step_ms"]) == {"1", "2", "4", "8", "16"}
    assert all(len(ms) == 2 and min(ms) > 0 for ms in found["step_ms"].values())
    assert command("--latency", first, *load, "--json", second)[0] == 0
    again = json.loads(second.read_text())
    assert again["step_ms"] == found["step_ms"]
    assert again["rows"][0]["p99_ms"] == pytest.approx(found["rows"][0]["p99_ms"], rel=1e-4)


def test_the_numbers_of_bench_do_and_what_they_lack_is_said(tmp_path: Path):
    path, out = tmp_path / "bench.json", tmp_path / "out.json"
    path.write_text(json.dumps({"candidates": {"sqap": {"step_ms": [40.0, 50.0, 50.0, 100.0]}}}))
    code, output = command("--latency", path, "--robots", 1, "--rate-hz", 1, "--p99-ms", 101, "--json", out)
    assert code == 0
    assert "a step for N robots is taken to last N times as long" in output
    found = json.loads(out.read_text())
    assert found["replicas"] == 1
    assert (found["rows"][0]["p50_ms"], found["rows"][0]["p99_ms"]) == (50, 100)


def test_options_reach_the_simulation(times: Path, tmp_path: Path):
    out = tmp_path / "out.json"
    options = ["--open-loop", "--poisson", "--network-ms", 4, "--deadline-ms", 80, "--batch", 3, "--seed", 7]
    code, output = command(
        "--latency", times, "--robots", 3, "--rate-hz", 9, "--p99-ms", 20, "--max-replicas", 2, *options,
        "--json", out,
    )  # fmt: skip
    assert code == 0
    assert "2 replicas do not hold a p99 of 20 ms" in output
    found = json.loads(out.read_text())
    assert found["load"] == {
        "robots": 3, "rate_hz": 9, "poisson": True, "waits": False, "network_s": 0.004, "deadline_s": 0.08
    }  # fmt: skip
    assert found["limits"]["batch"] == 3
    assert found["seed"] == 7
    assert found["rows"][0]["unanswered"]["late"] > 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot read step times from"),
        ("{}", "has no step times; `sqap capacity --json` and `sqap bench --json` write some"),
        ('{"step_ms": {"one": [1]}}', "is not as `sqap capacity --json` or `sqap bench --json` writes it"),
        ('{"step_ms": {"2": [1]}}', "none of a step for one robot"),
        ('{"step_ms": {"1": [-1]}}', "a step for 1 robots must be positive numbers"),
        ('{"step_ms": [1]}', "is not as"),
        ("[1]", "is not as"),
        ('{"candidates": {"sqap": {"reason": "no"}}}', "is not as"),
    ],
)
def test_a_file_without_step_times_is_a_sentence(tmp_path: Path, text: str, sentence: str):
    path = tmp_path / "times.json"
    path.write_text(text)
    code, output = command("--latency", path, "--robots", 1, "--rate-hz", 1, "--p99-ms", 9)
    assert code == 1
    assert sentence in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "name a policy to time, or a file with step times by --latency; one of the two"),
        (("reference", "--latency", "TIMES"), "one of the two"),
        (("--latency", "TIMES", "--threads", 2), "how a policy is read and timed is no choice there"),
        (("--latency", "TIMES", "--rate-hz", 0), "rate_hz must be a positive number"),
        (("--latency", "TIMES", "--p99-ms", 0), "--p99-ms must be positive, got 0"),
        (("--latency", "TIMES", "--network-ms", -1), "network_s must be zero or more"),
        (("--latency", "TIMES", "--deadline-ms", 0), "deadline_s must be positive"),
    ],
)
def test_a_mistake_is_one_sentence(times: Path, arguments, sentence):
    given = [times if argument == "TIMES" else argument for argument in arguments]
    usual = [["--robots", 2], ["--rate-hz", 1], ["--p99-ms", 300]]
    code, output = command(*given, *(part for pair in usual if pair[0] not in given for part in pair))
    assert code == 1
    assert sentence in output


def test_a_plan_of_no_replicas_is_refused():
    with pytest.raises(InputError, match="at least one replica must be tried"):
        plan(Load(1, 1.0), SHORT, Limits(), 1.0, most=0)
    with pytest.raises(InputError, match="must be a positive number"):
        plan(Load(1, 1.0), SHORT, Limits(), float("nan"))


def test_without_the_extra_one_sentence_says_what_to_install():
    code = """
import sys
sys.modules["simpy"] = None
from sqap.cli import app
app(["capacity", "reference", "--robots", "1", "--rate-hz", "1", "--p99-ms", "1"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'simulating servers needs simpy; pip install "sqap[serve]"' in " ".join(done.stderr.split())
