"""`sqap eval` from end to end, worker processes included; only policy and simulator are fakes."""

import dataclasses
import json
import re
from functools import partial
from pkgutil import resolve_name

import evaluation_fakes as fakes
import numpy as np
import pytest
from PIL import Image
from published import TINY, write_openvla
from typer.testing import CliRunner

from sqap import Policy
from sqap.checkpoints import fingerprint
from sqap.checkpoints.choices import Choices
from sqap.cli import app
from sqap.errors import SqapError
from sqap.evaluation import executors, settings, worker
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
    assert re.search(r"-workers1-ensemble3-[0-9a-f]{8}\.jsonl$", log.name)
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
    assert re.search(r"-workers1-[0-9a-f]{8}\.jsonl$", log.name)
    assert json.loads(log.read_text())["settings"]["ensemble"] is None


def test_episodes_from_the_log_are_counted_and_another_builds_are_not_used(command, monkeypatch, tmp_path):
    assert "from the log" not in command()[1]
    code, output = command("--json", "e.json")
    assert code == 0
    assert re.search(r"1 of 1 episodes are from the log of \d{4}-\d\d-\d\d \d\d:\d\d UTC", output)
    assert json.loads((tmp_path / "e.json").read_text())["from_log"]["episodes"] == 1
    (log,) = (tmp_path / "runs").iterdir()
    build = settings.build_and_processor()
    monkeypatch.setattr(settings, "build_and_processor", lambda: build | {"package": "changed"})
    code, output = command()
    assert code == 0
    assert "from the log" not in output
    assert f"not used: runs/{log.name}" in output.replace("\n", "")
    code, output = command("--log", log)
    assert code == 1
    assert "was written with build.package=" in output


def test_episodes_from_the_log_are_told_from_those_run_now(command, tmp_path):
    assert command()[0] == 0
    code, output = command("--episodes", 3, "--json", "e.json")
    assert code == 0
    assert "1 of 3 episodes are from the log of" in output
    assert json.loads((tmp_path / "e.json").read_text())["from_log"]["episodes"] == 1


# A part of the settings -> what tells it, and what it says on another machine.
MACHINES = {
    "simulator.mujoco": ("sqap.environments.describe", lambda told: told | {"mujoco": "another"}),
    "build.processor": ("sqap.kernels.cpu.describe", lambda told: told | {"processor": "another"}),
    "build.instructions": ("torch.backends.cpu.get_cpu_capability", lambda told: "another"),
}


@pytest.mark.parametrize("part", MACHINES)
def test_episodes_of_another_simulator_or_processor_are_not_used(command, monkeypatch, tmp_path, part):
    assert command()[0] == 0
    (log,) = (tmp_path / "runs").iterdir()
    place, change = MACHINES[part]
    tell = resolve_name(place)
    monkeypatch.setattr(place, lambda *given: change(tell(*given)))
    code, output = command()
    assert code == 0
    assert "from the log" not in output
    assert f"not used: runs/{log.name}" in output
    code, output = command("--log", log)
    assert code == 1
    assert f"was written with {part}=" in output
    assert "now it is another" in output


def test_a_worker_refuses_a_policy_that_is_not_the_one_it_labels(saved):
    known = fingerprint(saved)
    assert isinstance(worker.load_policy(str(saved), Choices(), known), Policy)
    with pytest.raises(SqapError, match="is not what it was when the evaluation began"):
        worker.load_policy(str(saved), Choices(), "f" * 64)


@pytest.fixture
def original(tmp_path):
    """A published OpenVLA with the statistics of two data sets."""
    directory = tmp_path / "original"
    write_openvla(directory, sizes=dataclasses.replace(TINY, siglip_width=96))
    config = json.loads((directory / "config.json").read_text())
    first, *_ = config["norm_stats"].values()
    second = json.loads(json.dumps(first))
    second["action"]["q99"] = [2 * value for value in second["action"]["q99"]]
    config["norm_stats"] = {"one": first, "two": second}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_published_original_is_the_baseline_of_its_own_compression(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(executors, "evaluate", partial(executors.evaluate, make=fakes.make_seven))
    (tmp_path / "r.json").write_text(json.dumps({"quantization": {"weight_bits": 8, "activation_bits": 8}}))
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    (tmp_path / "frames").mkdir()
    Image.fromarray(image).save(tmp_path / "frames" / "0.png")
    line = {"file_name": "0.png", "instruction": "walk"}
    (tmp_path / "frames" / "metadata.jsonl").write_text(json.dumps(line))

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    read = ["--unnorm-key", "two", "--cameras", "camera"]
    run("compress", original, "--out", "small", "--recipe", "r.json", "--frames-from", "frames", *read)
    pair = ["eval", "small", "--against", original, "--tasks", "door-open", "--episodes", 1]
    run(*pair, *read, "--json", "e.json")
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["tasks"].keys() == report["against"]["tasks"].keys() == {"door-open"}
    assert "name one as unnorm_key: one, two" in run(*pair, code=1)
    out = run("eval", "small", "--tasks", "door-open", "--episodes", 1, *read, code=1)
    assert "--unnorm-key and --cameras: a choice of how published policies are read" in out
    once = "--steps", 1, "--warmups", 0, "--threads", 1
    bench = run("bench", original, *once, "--vs", "", "--recipe", "r.json", *read)
    assert "sqap" in bench
    assert len({fingerprint(original, Choices(unnorm_key=key)) for key in ("one", "two")}) == 2
    run("sensitivity", original, "--recipe", "r.json", "--frames-from", "frames", *read)
    run("inspect", original, *read)
