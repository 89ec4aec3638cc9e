"""Worker processes take a second or two each to start, so tests share what they run."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import evaluation_fakes as fakes
import pytest

from sqap.environments import action_units
from sqap.errors import CheckpointError, InputError, SqapError
from sqap.evaluation import evaluate
from sqap.evaluation.lanes import run_here
from sqap.evaluation.rollout import run_episode
from sqap.evaluation.worker import WARMUP_CALLS
from sqap.process import peak_rss_bytes

TASKS = ["door-open", "door-close"]


def run(policies, log=None, progress=None, **options):
    settings = {"tasks": TASKS, "episodes": 2, "seed": 10, "load": fakes.load, "make": fakes.make}
    settings |= options
    names = [f"fingerprint of {policy}" for policy in policies]
    return evaluate(policies, "metaworld", fingerprints=names, log=log, progress=progress, **settings)


def outcomes(result):
    return [
        (r.episode.task, r.episode.seed, r.episode.success, r.episode.steps, r.episode.jerk)
        for r in result.records
    ]


def looks(result):
    """How often the policy was called in each episode."""
    return [-(-r.episode.steps // fakes.HORIZON) for r in result.records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two policies that act alike, one of them large: their runs, their log, and the progress calls."""
    log = tmp_path_factory.mktemp("evaluation") / "log.jsonl"
    calls = []
    runs = run(["walker", "hungry"], log, lambda record, done, total: calls.append((record, done, total)))
    return runs, log, calls


def test_every_episode_runs_with_its_seed(finished):
    (walker, _), _, _ = finished
    assert (walker.policy, walker.env, walker.seed) == ("walker", "metaworld", 10)
    assert [o[:2] for o in outcomes(walker)] == [(task, seed) for task in TASKS for seed in (10, 11)]


def test_processes_run_what_run_episode_runs(finished):
    (walker, _), _, _ = finished
    here = run_episode(fakes.Walker(), fakes.Corridor("door-open"), 11, units=action_units("metaworld"))
    there = walker.records[1].episode
    assert (there.success, there.steps, there.jerk) == (here.success, here.steps, here.jerk)


def test_processes_execute_as_much_of_a_chunk_as_asked():
    (walker,) = run(["walker"], execute=1, episodes=1, tasks=TASKS[:1])
    (record,) = walker.records
    assert len(record.episode.latencies_ms) == record.episode.steps - WARMUP_CALLS


def test_every_policy_uses_the_ensemble(tmp_path):
    log = tmp_path / "log.jsonl"
    policies, options = ["walker", "crawler"], {"ensemble": 2, "episodes": 1, "tasks": TASKS[:1]}
    walker, crawler = (result.records[0] for result in run(policies, log, **options))
    for record, stride in ((walker, 1.0), (crawler, 0.1)):
        policy, env = fakes.Walker(stride), fakes.Corridor(TASKS[0])
        here = run_episode(policy, env, 10, units=action_units("metaworld"), ensemble=2)
        assert (record.episode.steps, record.episode.jerk) == (here.steps, here.jerk)
        assert len(record.episode.latencies_ms) == here.steps - WARMUP_CALLS
    before = log.read_bytes()
    for other in (None, 1):
        with pytest.raises(InputError, match=rf"ensemble=2, now it is {other}"):
            run(policies, log, **options | {"ensemble": other}, load=None)
    assert log.read_bytes() == before


def test_policies_that_act_alike_have_identical_episodes(finished):
    (walker, hungry), _, _ = finished
    assert outcomes(walker) == outcomes(hungry)


def test_policies_take_turns(finished):
    _, _, calls = finished
    order = [(record.episode.task, record.episode.seed, record.policy) for record, _, _ in calls]
    policies = ["fingerprint of walker", "fingerprint of hungry"]
    assert order == [(task, seed, p) for task in TASKS for seed in (10, 11) for p in policies]
    assert [(done, total) for _, done, total in calls] == [(i, 8) for i in range(1, 9)]


def test_each_policy_has_its_own_memory(finished):
    (walker, hungry), _, _ = finished
    peaks = [max(r.peak_rss_bytes for r in result.records) for result in (walker, hungry)]
    assert peaks[1] - peaks[0] > 200 * fakes.MEBIBYTE


def test_a_processs_first_calls_are_no_latencies(finished):
    (walker, _), _, _ = finished
    measured = [len(r.episode.latencies_ms) for r in walker.records]
    looked = looks(walker)
    assert measured == [looked[0] - WARMUP_CALLS, *looked[1:]]


def test_a_finished_log_starts_no_process(finished):
    runs, log, _ = finished
    again = run(["walker", "hungry"], log, load=None)
    assert [r.records for r in again] == [r.records for r in runs]
    assert [r.from_log for r in again] == [r.records for r in runs]
    assert [r.from_log for r in runs] == [(), ()]


def test_a_crashed_evaluation_resumes(finished, tmp_path):
    runs, log, _ = finished
    lines = log.read_bytes().splitlines(keepends=True)
    # Three episodes and a half: the third is the first policy's on the second seed.
    partial = tmp_path / "log.jsonl"
    partial.write_bytes(b"".join(lines[:3]) + lines[3][:50])
    calls = []
    resumed = run(["walker", "hungry"], partial, lambda record, *count: calls.append((record.key, *count)))
    assert [outcomes(result) for result in resumed] == [outcomes(result) for result in runs]
    assert [len(result.from_log) for result in resumed] == [2, 1]
    assert calls[0] == (("fingerprint of hungry", "door-open", 11), 4, 8)
    assert len(calls) == 5
    keys = [
        (data["policy"], data["episode"]["task"], data["episode"]["seed"])
        for data in map(json.loads, partial.read_text().splitlines())
    ]
    assert len(keys) == len(set(keys)) == 8


def test_more_episodes_extend_a_log_and_fewer_read_a_part_of_it(finished):
    runs, log, _ = finished
    (fewer,) = run(["walker"], None, episodes=1, tasks=TASKS[1:])
    assert outcomes(fewer) == outcomes(runs[0])[2:3]
    part = run(["walker", "hungry"], log, episodes=1, tasks=TASKS[1:], load=None)
    assert [outcomes(result) for result in part] == [outcomes(result)[2:3] for result in runs]


def test_parallel_workers_do_the_same_episodes(finished):
    runs, _, _ = finished
    (walker,) = run(["walker"], workers=2)
    assert outcomes(walker) == outcomes(runs[0])
    # Each of two processes drops its first calls.
    measured = sum(len(r.episode.latencies_ms) for r in walker.records)
    assert measured == sum(looks(walker)) - 2 * WARMUP_CALLS


@pytest.mark.parametrize(
    ("policy", "options", "kind", "message"),
    [
        ("missing", {}, CheckpointError, r"^there is no policy at 'missing'$"),
        ("threads", {"threads": 3}, InputError, r"^running with 3 threads$"),
        ("walker", {"ensemble": 5}, InputError, r"^an ensemble must be of 1 to 4 chunks.* got 5$"),
        ("buggy", {}, RuntimeError, r"ZeroDivisionError"),
        ("dying", {}, SqapError, r"dying ended with exit code 3 "),
    ],
)
def test_what_goes_wrong_in_a_process_is_said_here(policy, options, kind, message):
    with pytest.raises(kind, match=message):
        run([policy], **options)
    assert multiprocessing.active_children() == []


def test_an_exception_in_the_parent_leaves_no_process(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    log = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt) as caught:
        run(["walker"], log, stop)
    assert multiprocessing.active_children() == []
    assert caught.traceback  # held, so that no garbage collector did it
    assert len(log.read_text().splitlines()) == 1


SCRIPT = """
import multiprocessing, signal, sys
sys.path.insert(0, {here!r})
import evaluation_fakes as fakes
from sqap.evaluation import evaluate

if __name__ == "__main__":
    # What starts pytest in the background may have it ignore interrupts, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        evaluate(["slow"], "metaworld", ["door-open"], 1, 0, fingerprints=["x"],
                 load=fakes.load, make=fakes.make)
    except KeyboardInterrupt:
        print("interrupted", multiprocessing.active_children())
"""


def test_ctrl_c_ends_everything_without_a_trace(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, script], text=True, start_new_session=True, **pipes)
    assert process.stdout.readline() == "loading\n"
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    out, err = process.communicate(timeout=120)
    assert out == "interrupted []\n"
    assert err == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"ensemble": 0}, "an ensemble must be of at least 1 chunk, got 0"),
        ({"ensemble": 2, "execute": 1}, "execute=1 cannot be asked for too"),
        ({"seed": -1}, "must not be negative, got -1"),
        ({"tasks": ["fly"]}, "unknown metaworld task 'fly'"),
        ({"tasks": []}, "no tasks are named"),
    ],
)
def test_impossible_requests_are_refused_before_anything_starts(changed, message):
    with pytest.raises(InputError, match=message):
        run(["walker"], load=None, **changed)


def test_a_policy_against_itself_is_refused():
    with pytest.raises(InputError, match="nothing to compare"):
        run(["walker", "walker"], load=None)


def test_every_policy_needs_a_fingerprint():
    with pytest.raises(InputError, match="2 policies and 1"):
        evaluate(["a", "b"], "metaworld", TASKS, 1, 0, fingerprints=["a"])


def test_peak_memory_grows_with_what_is_used_and_never_shrinks():
    before = peak_rss_bytes()
    held = bytearray(os.urandom(fakes.MEBIBYTE)) * (before // fakes.MEBIBYTE + 64)
    grown = peak_rss_bytes()
    assert grown - before >= 60 * fakes.MEBIBYTE
    del held
    # Linux rounds its counters a little differently when memory is freed.
    assert peak_rss_bytes() >= grown - fakes.MEBIBYTE


def test_an_evaluation_that_keeps_going_notes_what_failed(tmp_path):
    """A bug is met once; a process that dies is started again, and after three deaths its episode failed."""
    log = tmp_path / "log.jsonl"
    options = {"keep_going": True, "tasks": TASKS[:1]}
    (buggy, dying) = run(["buggy", "dying"], log, episodes=1, **options)
    reason = dying.records[0].episode.failure
    assert (
        reason == "the process that ran dying ended with exit code 3 (-9 usually means that memory ran out)"
    )
    assert buggy.records[0].episode.failure == "ZeroDivisionError: division by zero"
    assert (buggy.records[0].episode.success, buggy.records[0].episode.latencies_ms) == (False, ())
    again = run(["buggy", "dying"], log, episodes=1, load=None, **options)
    assert [each.records for each in again] == [buggy.records, dying.records]
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_once_costs_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_DEATHS", str(tmp_path / "deaths"))
    (fragile,) = run(["fragile"], keep_going=True)
    assert outcomes(fragile) == outcomes(finished[0][0])
    assert (tmp_path / "deaths").read_text() == "one"


def test_here_runs_what_processes_run(finished):
    (walker,) = run(["walker"], executor=run_here)
    assert outcomes(walker) == outcomes(finished[0][0])
    assert [len(r.episode.latencies_ms) for r in walker.records] == [
        len(r.episode.latencies_ms) for r in finished[0][0].records
    ]
