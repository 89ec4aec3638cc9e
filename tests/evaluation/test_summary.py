import dataclasses
import json

import pytest

from sqap.evaluation.executors import Run
from sqap.evaluation.log import Record
from sqap.evaluation.rollout import Episode
from sqap.evaluation.settings import Settings
from sqap.evaluation.statistics import mcnemar_exact, paired_difference, wilson
from sqap.evaluation.summary import summarize

SETTINGS = Settings("metaworld", None, 1, 1)
SHARED_KEYS = {
    "policy",
    "env",
    "seed",
    "ensemble",
    "tasks",
    "success",
    "success_ci95",
    "completion_steps",
    "jerk",
    "step_latency_ms",
    "peak_rss_bytes",
    "from_log",
}


def run(policy, successes, latencies=(10.0, 20.0), settings=SETTINGS):
    """Two tasks, the outcomes of one after those of the other."""
    half = len(successes) // 2
    records = []
    for i, success in enumerate(successes):
        task = "door-open" if i < half else "door-close"
        episode = Episode(task, 50 + i % half, success, 10 * (i + 1), float(i), latencies)
        records.append(Record(policy, settings, (100 + i) << 20, episode))
    return Run(f"runs/{policy}", "metaworld", 50, tuple(records))


def test_one_policy():
    summary = summarize(run("a", [True, False, True, True]))
    assert set(summary) == SHARED_KEYS
    assert (summary["policy"], summary["env"], summary["seed"]) == ("runs/a", "metaworld", 50)
    assert summary["tasks"] == {
        "door-open": {"successes": 1, "episodes": 2},
        "door-close": {"successes": 2, "episodes": 2},
    }
    assert summary["success"] == 0.75
    assert summary["success_ci95"] == list(wilson(3, 4))
    assert summary["completion_steps"] == pytest.approx((10 + 30 + 40) / 3)
    assert summary["jerk"] == 1.5
    assert summary["step_latency_ms"] == pytest.approx({"p50": 15.0, "p95": 20.0, "p99": 20.0})
    assert summary["peak_rss_bytes"] == 103 << 20


def test_the_ensemble_is_told_for_both_policies():
    settings = dataclasses.replace(SETTINGS, ensemble=2)
    runs = [run(name, [True, False], settings=settings) for name in ("a", "b")]
    summary = summarize(*runs)
    assert summary["ensemble"] == summary["against"]["ensemble"] == 2
    assert summarize(run("a", [True, False]))["ensemble"] is None


def test_two_policies_are_compared_episode_by_episode():
    a, b = [True, True, True, False, True, True], [True, False, False, True, False, False]
    summary = summarize(run("a", a), run("b", b))
    against = summary["against"]
    assert set(against) == SHARED_KEYS | {"mcnemar_p", "difference", "difference_ci95"}
    assert against["policy"] == "runs/b"
    assert against["success"] == pytest.approx(2 / 6)
    assert against["mcnemar_p"] == mcnemar_exact(4, 1)
    difference, low, high = paired_difference(a, b)
    assert against["difference"] == difference == pytest.approx(summary["success"] - against["success"])
    assert against["difference_ci95"] == [low, high]


def test_nothing_to_average_is_null_and_the_rest_is_json():
    summary = json.loads(json.dumps(summarize(run("a", [False, False], latencies=()))))
    assert summary["completion_steps"] is None
    assert summary["step_latency_ms"] == {"p50": None, "p95": None, "p99": None}
    assert summary["success"] == 0
