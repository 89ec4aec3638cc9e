"""`sqap ablate` from end to end, with a simulator that needs nothing and policies really compressed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

import sqap
import sqap.frames
from sqap.checkpoints import fingerprint
from sqap.cli import app
from sqap.evaluation import executors
from sqap.evaluation.statistics import pairs_needed
from sqap.evaluation.worker import load_policy
from sqap.files import locked
from sqap.recipe import Recipe
from tests.study import stub
from tests.study.conftest import FACTORS, Ablate

EXAMPLE = Path(__file__).parent / "example.json"
CELLS = [
    "16",
    "16+lookahead-0.5-after2",
    "16+random-0.5-after2",
    "w4a8",
    "w4a8+lookahead-0.5-after2",
    "w4a8+random-0.5-after2",
]
# Objects whose keys are names of the study's own.
OPEN = ("simulator", "build", "processors", "factors", "tasks", "weights", "pairs_needed", "levels", "recipe")
CIRCUMSTANCES = (
    "step_latency_ms",
    "peak_rss_bytes",
    "created",
    "command",
    "commands",
    "estimate",
    "execution",
)
VARYING = ("peak_rss_bytes", "finished", "latencies_ms")


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "study.json").read_text())
    return found


def lines(out: Path) -> list[dict[str, Any]]:
    logs = [path.read_text() for path in sorted(out.glob("episodes/*.jsonl"))]
    return [json.loads(line) for log in logs for line in log.splitlines() if line.endswith("}")]


def episodes(out: Path) -> list[dict[str, Any]]:
    """What happened, without times and memory, in an order that does not depend on when."""
    found = [
        {"policy": line["policy"]} | {k: v for k, v in line["episode"].items() if k not in VARYING}
        for line in lines(out)
    ]
    return sorted(found, key=lambda e: (e["policy"], e["task"], e["seed"]))


def outcome(study: dict[str, Any]) -> Any:
    """The part of a study that two runs of it must share."""

    def strip(data: Any) -> Any:
        if isinstance(data, dict):
            return {key: strip(value) for key, value in data.items() if key not in CIRCUMSTANCES}
        return [strip(value) for value in data] if isinstance(data, list) else data

    return strip(study)


def shape(data: Any) -> Any:
    """The keys of nested objects; of lists their first entry's."""
    if isinstance(data, dict):
        had = {key: value for key, value in data.items() if value is not None}
        return {key: "open" if key in OPEN else shape(value) for key, value in had.items()}
    if isinstance(data, list):
        return [shape(data[0])] if data else []
    return "value"


def test_all_episodes_run_once_and_in_pairs(finished: tuple[Path, Any]) -> None:
    found = lines(finished[0])
    keys = Counter((line["policy"], line["episode"]["task"], line["episode"]["seed"]) for line in found)
    assert set(keys.values()) == {1}
    seeds = Counter(key[1:] for key in keys)
    assert seeds == {(task, 4_000_000 + e): len(CELLS) for task in stub.TASKS for e in range(3)}


def test_the_study_says_what_its_episodes_say(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    study = read(out)
    assert study["complete"]
    assert [cell["name"] for cell in study["cells"]] == CELLS
    by_policy: dict[str, list[bool]] = {}
    for line in lines(out):
        by_policy.setdefault(line["policy"], []).append(line["episode"]["success"])
    baseline = by_policy[study["cells"][0]["fingerprint"]]
    assert 0 < sum(map(sum, by_policy.values())) < 6 * len(CELLS)
    for cell in study["cells"]:
        won = by_policy[cell["fingerprint"]]
        assert cell["summary"]["success"] == sum(won) / 6
        interval = binomtest(sum(won), 6).proportion_ci(method="wilson")
        assert cell["summary"]["success_ci95"] == pytest.approx([interval.low, interval.high])
        if cell["name"] != "16":
            pair = cell["against_baseline"]
            assert pair["difference"] == pytest.approx((sum(won) - sum(baseline)) / 6)
            discordant = pair["wins"] + pair["losses"]
            expected = binomtest(pair["wins"], discordant).pvalue if discordant else 1.0
            assert pair["mcnemar_p"] == pytest.approx(expected)
    success = {cell["name"]: cell["summary"]["success"] for cell in study["cells"]}
    for contrast in study["contrasts"]:
        assert sum(contrast["weights"].values()) == pytest.approx(0)
        value = sum(weight * success[cell] for cell, weight in contrast["weights"].items())
        assert contrast["difference"] == pytest.approx(value)
        low, high = contrast["ci95"]
        assert low - 1e-9 <= value <= high + 1e-9
        assert 0 < contrast["p"] <= contrast["p_holm"] <= 1
    assert {c["name"] for c in study["contrasts"]} >= {
        "bits: w4a8 minus 16",
        "keep: 0.5 minus 1.0",
        "bits: w4a8 minus 16, under random minus unpruned",
    }


def test_its_page_shows_it_with_videos_of_its_first_episodes(finished: tuple[Path, Any]) -> None:
    pytest.importorskip("imageio_ffmpeg")
    out, result = finished
    page = (out / "report" / "index.html").read_text()
    study = json.loads((out / "study.json").read_text())
    assert all(f'<tr id="{cell["name"]}">' in page for cell in study["cells"])
    assert page.count("data:video/mp4;base64,") == page.count("data:image/png;base64,") == 2
    assert "its page is" in result.output


def test_steps_timed_in_turns_are_the_pages_latencies(finished: tuple[Path, Any], tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished[0], out)
    arguments = ["report", str(out), "--videos", "0"]
    result = CliRunner().invoke(app, [*arguments, "--steps", "3"])
    assert result.exit_code == 0, result.output
    steps = json.loads((out / "steps.json").read_text())
    cells = {cell["name"]: cell for cell in read(out)["cells"]}
    assert steps["steps"] == 3
    assert list(steps["cells"]) == list(cells)
    page = " ".join((out / "report" / "index.html").read_text().split())
    assert "Latencies are of 3 steps of each cell, timed in turns" in page
    for name, cell in steps["cells"].items():
        times = cell["step_latency_ms"]
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
        assert cell["fingerprint"] == cells[name]["fingerprint"]
        assert f"step p50 {times['p50']:.1f} ms" in page
    before = read(out)["cells"][0]["summary"]["step_latency_ms"]
    assert before != steps["cells"][next(iter(cells))]["step_latency_ms"]  # the study's own stay

    steps["cells"]["w4a8"]["fingerprint"] = "another"
    (out / "steps.json").write_text(json.dumps(steps))
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "has no times of w4a8 as it is now; time them again" in " ".join(refused.output.split())


def test_it_measures_more_than_success(finished: tuple[Path, Any]) -> None:
    cells = {cell["name"]: cell for cell in read(finished[0])["cells"]}
    original, small = cells["16"], cells["w4a8+lookahead-0.5-after2"]
    assert original["replay"] is original["attention"] is original["artefact"] is None
    assert small["replay"]["relative"] > cells["16+lookahead-0.5-after2"]["replay"]["relative"] > 0
    assert small["weight_bytes"] < original["weight_bytes"]
    assert (original["visual_tokens"], small["visual_tokens"]) == (16, 8)
    assert 0 < small["attention"]["overlap"] <= 1
    assert 0 < small["attention"]["entropy"] <= 1
    assert cells["16+lookahead-0.5-after2"]["attention"]["overlap"] == 1.0
    assert cells["w4a8+random-0.5-after2"]["attention"] is None
    summary = small["summary"]
    moved = [line["episode"] for line in lines(finished[0]) if line["policy"] == small["fingerprint"]]
    by_task = [np.mean([e["path_length"] for e in moved if e["task"] == task]) for task in stub.TASKS]
    assert summary["path_length"]["mean"] == pytest.approx(np.mean(by_task))
    assert summary["gripper_flips"]["mean"] >= 0
    assert summary["peak_rss_bytes"] > 1 << 20


def test_the_example_of_a_study_has_its_fields(
    finished: tuple[Path, Any],
) -> None:
    example, study = json.loads(EXAMPLE.read_text()), read(finished[0])
    # One cell that has everything stands for all.
    for data, name in ((example, "w4a8+lookahead-0.25"), (study, "w4a8+lookahead-0.5-after2")):
        data["cells"] = [cell for cell in data["cells"] if cell["name"] == name]
        assert len(data["cells"]) == 1
        data["cells"][0]["summary"]["failures"] = []
        data["contrasts"] = data["contrasts"][:1]
        for key in ("millimetres", "drift", "gripper_flips"):
            del data["cells"][0]["replay"][key]  # null of a policy without units
        data["power"].pop("detectable", None)  # null where no size of a change can be seen
        assert data["prediction"].keys() == {"cells", "spearman", "kendall"}
        data["prediction"] = None  # its parts are null where all cells succeed equally often
    assert shape(study) == shape(example)


def test_a_cells_commands_make_the_same_policy(
    finished: tuple[Path, Any], tmp_path: Path, small_policy: Path
) -> None:
    """Quantized at once and pruned later is what `sqap compress` does in one go."""
    out, _ = finished
    for cell in read(out)["cells"]:
        if cell["name"] == "w4a8+lookahead-0.5-after2":
            assert cell["commands"][0].startswith(f"sqap compress {small_policy} --recipe recipes/w4a8")
            recipe = Recipe.read(out / cell["recipe_file"])
            policy = sqap.load(small_policy)
            frames = sqap.frames.collect_frames(policy, "stub", stub.TASKS, 4)
            sqap.compress(policy, recipe, frames).save(tmp_path / "small")
            assert (
                fingerprint(tmp_path / "small") == cell["fingerprint"] == fingerprint(out / cell["artefact"])
            )


def test_cells_that_quantize_alike_share_a_file_of_weights(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    files: dict[str, set[int]] = {}
    for cell in read(out)["cells"]:
        if cell["artefact"] is not None:
            bits = cell["levels"]["bits"]
            files.setdefault(bits, set()).add((out / cell["artefact"] / "model.safetensors").stat().st_ino)
    assert {bits: len(inodes) for bits, inodes in files.items()} == {"16": 1, "w4a8": 1}


def test_the_same_command_again_runs_nothing_and_more_episodes_go_on(
    finished: tuple[Path, Any], ablate: Ablate, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished[0], out)

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.glob("episodes/*")}

    before, artefacts = content(), sorted(path.name for path in out.glob("policies/*"))
    again = ablate(out)
    assert again.exit_code == 0, again.output
    assert content() == before
    assert outcome(read(out)) == outcome(read(finished[0]))

    more = ablate(out, factors="bits=16,w4a8", episodes=4)
    assert more.exit_code == 0, more.output
    assert "16 episodes, 12 of them in the log" in " ".join(more.output.split())
    assert sorted(path.name for path in out.glob("policies/*")) == artefacts
    longer = {name: new for name, new in content().items() if new != before[name]}
    assert len(longer) == 2
    assert all(new.startswith(before[name]) and new.count(b"\n") == 8 for name, new in longer.items())


SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.study import stub
import pytest
stub.hurry(pytest.MonkeyPatch())
stub.PAUSE = 0.02
from sqap.cli import app
app()
"""


def test_a_study_that_is_killed_goes_on_with_nothing_lost_or_run_twice(
    finished: tuple[Path, Any], ablate: Ablate, small_policy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "episodes")
    (out / "study.json").unlink()
    arguments = ["ablate", small_policy, "--out", out, "--env", "stub", "--frames", 4, "--yes"]
    arguments += ["--factors", FACTORS, "--episodes", 3, "--executor", "serial"]
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(lines(out)) < 8 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    killed = {path: path.read_bytes().rpartition(b"\n")[0] for path in out.glob("episodes/*")}
    assert ablate(out).exit_code == 0
    assert all(path.read_bytes().startswith(content) for path, content in killed.items())
    assert episodes(out) == episodes(finished[0])
    assert outcome(read(out)) == outcome(read(finished[0]))


def test_a_full_disk_ends_it_with_a_sentence_and_it_goes_on_later(
    finished: tuple[Path, Any], ablate: Ablate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "episodes")
    write, left = os.write, [7]

    def fill(file: int, content: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{file}").endswith(".jsonl"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        result = ablate(out)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "No space left on device; the same command goes on from the episodes that are in it" in said
    partial = read(out)
    assert not partial["complete"]
    assert [cell["summary"] and cell["summary"]["episodes"] for cell in partial["cells"]][:3] == [6, 1, None]
    assert ablate(out).exit_code == 0
    assert episodes(out) == episodes(finished[0])
    assert outcome(read(out)) == outcome(read(finished[0]))


def test_a_file_that_cannot_grow_ends_it_in_the_middle_of_a_line(
    finished: tuple[Path, Any], ablate: Ablate, tmp_path: Path
) -> None:
    """The system itself refuses to write on, as it does on a full disk or over a quota."""
    out = tmp_path / "study"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "episodes")
    log = next(finished[0].glob("episodes/16-*"))
    room = len(b"".join(log.read_bytes().splitlines(keepends=True)[:2])) + 100  # two lines and part of one
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        result = ablate(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1
    assert "File too large; the same command goes on from the episodes" in " ".join(result.output.split())
    (log,) = out.glob("episodes/*")
    assert len(lines(out)) == log.read_bytes().count(b"\n") == 2  # the part was cut off again
    assert (out / "study.json").read_bytes() == (finished[0] / "study.json").read_bytes()  # none fits
    assert ablate(out).exit_code == 0
    assert episodes(out) == episodes(finished[0])
    assert outcome(read(out)) == outcome(read(finished[0]))


def test_a_process_that_is_killed_again_and_again_fails_its_episode_alone(
    ablate: Ablate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = tmp_path / "deaths"
    deaths.touch()
    monkeypatch.setenv("STUB_DEATHS", str(deaths))
    monkeypatch.setattr(executors, "evaluate", partial(executors.evaluate, make=stub.make_deadly))
    out = tmp_path / "study"
    result = ablate(out, "--executor", "processes", factors="bits=16,w4a8 rounding=rtn", episodes=2)
    assert result.exit_code == 0, result.output
    assert len(deaths.read_text()) == 3
    original, small = (cell["summary"] for cell in read(out)["cells"])
    assert [(s["episodes"], s["failed"]) for s in (original, small)] == [(4, 1), (4, 0)]
    (failure,) = original["failures"]
    assert (failure["task"], failure["seed"]) == ("close", 4_000_001)
    assert "ended with exit code -9" in failure["reason"]
    keys = Counter((line["policy"], line["episode"]["task"], line["episode"]["seed"]) for line in lines(out))
    assert set(keys.values()) == {1}


def load_broken(path: str, *rest: Any) -> Any:
    """The policy, whose actions are not finite if it was compressed."""
    policy = load_policy(path, *rest)
    if policy.recipe == Recipe():  # type: ignore[attr-defined]
        return policy
    chunk = np.full((8, 4), np.nan, dtype=np.float32)
    return SimpleNamespace(step=lambda *_, **__: SimpleNamespace(chunk=chunk, memory=None, selection=None))


def test_episodes_that_raise_or_are_not_finite_are_failed_ones_and_the_study_goes_on(
    ablate: Ablate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "evaluate", partial(executors.evaluate, load=load_broken))
    monkeypatch.setattr(stub, "BROKEN", {("close", 4_000_001)})
    out = tmp_path / "study"
    result = ablate(out, factors="bits=16,w4a8 rounding=rtn", episodes=2)
    assert result.exit_code == 0, result.output
    study = read(out)
    assert study["complete"]
    original, small = (cell["summary"] for cell in study["cells"])
    assert (original["episodes"], original["failed"]) == (4, 1)
    assert original["failures"] == [
        {"task": "close", "seed": 4_000_001, "reason": "RuntimeError: the solver diverged"}
    ]
    assert (original["tasks"]["close"]["episodes"], original["tasks"]["close"]["failed"]) == (2, 1)
    assert (small["failed"], small["success"], small["jerk"]) == (4, 0.0, None)
    assert {f["reason"] for f in small["failures"] if f["task"] == "open"} == {
        "the policy gave an action on open that is not finite"
    }
    said = " ".join(result.output.split())
    assert "failed: 16, close, seed 4000001: RuntimeError: the solver diverged" in said
    page = (out / "report" / "index.html").read_text()
    for cell in study["cells"]:
        for f in cell["summary"]["failures"]:
            assert f"<li>{cell['name']}, {f['task']}, seed {f['seed']}: {f['reason']}</li>" in page


def test_a_second_study_in_one_directory_is_refused(ablate: Ablate, tmp_path: Path) -> None:
    with locked(tmp_path / "study.lock", ""):
        result = ablate(tmp_path, factors="bits=16,w4a8")
    assert result.exit_code == 1
    assert f"another process runs a study in {tmp_path}" in result.output.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["study.lock"]


def test_a_dry_run_says_what_would_run_and_writes_nothing(ablate: Ablate, tmp_path: Path) -> None:
    out = tmp_path / "study"
    result = ablate(out, "--dry-run", factors="bits=16,w4a8 rotation=off,on keep=1.0,0.5,0.01", episodes=40)
    said = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "full factorial, 1/1 of 12 combinations: 6 cells" in said
    assert "combinations merged: rotation and rounding mean nothing at 16 bits" in said
    assert "left out, as it cannot be" in said
    assert "0.0625 keeps one" in said
    assert "480 episodes: about" in said
    assert "80 pairs show a change of" in said
    assert f"to see a change takes so many pairs: 1 points {pairs_needed(0.01, 0.2)}" in said
    assert f"3 points {pairs_needed(0.03, 0.2)}," in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--executor", "serial", "--workers", 2], "serial runs one episode at a time"),
        (["--executor", "threads"], "--executor must be one of serial, processes, ray"),
        (["--address", "auto"], "--address auto is of a Ray cluster"),
        (["--fraction", "half"], "--fraction half must be a share such as 1/2"),
        (["--fraction", "1/100"], "leaves 1, but main effects alone need 4"),
        (["--tasks", "fly"], "unknown stub task 'fly'"),
    ],
)
def test_what_cannot_be_is_refused_first(
    ablate: Ablate, tmp_path: Path, options: list[object], sentence: str
) -> None:
    result = ablate(tmp_path / "study", *options)
    assert result.exit_code == 1
    assert sentence in " ".join(result.output.split())
    assert not (tmp_path / "study").exists()


def test_without_a_terminal_it_must_be_told_to_run(small_policy: Path, tmp_path: Path) -> None:
    arguments = ["ablate", small_policy, "--out", tmp_path / "study", "--env", "stub", "--episodes", 1]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1
    assert "give --yes to run this, or --dry-run to see it" in " ".join(result.output.split())
