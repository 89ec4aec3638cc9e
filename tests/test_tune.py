"""Successive halving: what goes on, what is out, and the command from end to end on a fake simulator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sqap
from sqap.cli import app
from sqap.compress import Repruner, reprune
from sqap.errors import InputError
from sqap.evaluation import executors
from sqap.models import DecoderConfig
from sqap.recipe import Cut, Pruning, Quantization, Recipe, Scheme
from sqap.tune import (
    Cost,
    CostLimits,
    Outcomes,
    Setting,
    Standing,
    candidates,
    compare,
    cost_of,
    halve,
    step_times,
)
from tests.evaluation import evaluation_fakes as fakes

DECODER = DecoderConfig(
    vocabulary=32, width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, mlp_width=11008
)
TASKS = tuple(f"task {i}" for i in range(12))
QUICK = Recipe(Quantization(Scheme(8, 8)))


COST = Cost(10.0, 9.0, 11.0, 1000)


def test_candidates_fit_the_policy_and_differ() -> None:
    for depth, tokens in ((32, 256), (6, 64), (2, 4), (1, 16)):
        none, *found = candidates(DecoderConfig(8, 16, depth, 2, 2, 8, 16), tokens)
        assert none is None
        cuts = [pruning.cuts for pruning in found if pruning is not None]
        assert len(set(cuts)) == len(found)
        assert all(cut[-1].after_layer < depth and round(cut[-1].keep_ratio * tokens) >= 1 for cut in cuts)
        assert bool(found) == (depth > 1)
    assert Pruning(0.5, 3, later=(Cut(5, 0.25),)) in candidates(DECODER, 256)


def player(rates: Callable[[Setting | None], float], played: list[tuple[Setting | None, int, int]]):
    """Outcomes with a rate of success for each setting; every episode has a difficulty of its own."""

    def play(setting: Setting | None, episodes: int, seed: int) -> Outcomes:
        played.append((setting, episodes, seed))
        keys = [(task, seed + i) for task in TASKS for i in range(episodes)]
        return {key: random.Random(str(key)).random() < rates(setting) for key in keys}

    return play


def settings(*keeps: float) -> dict[Setting, Cost]:
    """Settings that are the faster the fewer tokens they keep."""
    return {
        Setting("w4a8", Pruning(keep, 3, method="random")): Cost(100 * keep, 90 * keep, 110 * keep, 1000)
        for keep in keeps
    }


def falls(setting: Setting | None) -> float:
    """Success falls with the tokens that are kept; from 0.25 on it is the original's."""
    if setting is None or setting.pruning is None or setting.pruning.keep_ratio >= 0.25:
        return 0.9
    return 2 * setting.pruning.keep_ratio


def keep(standing: Standing) -> float:
    assert standing.setting.pruning is not None
    return standing.setting.pruning.keep_ratio


def test_with_a_largest_drop_the_fastest_that_loses_little_is_left() -> None:
    played: list[tuple[Setting | None, int, int]] = []
    costs = settings(0.9, 0.8, 0.6, 0.4, 0.25, 0.15, 0.1, 0.05)
    rungs = list(halve(costs, player(falls, played), max_drop=0.03, seed=7, rungs=(2, 4, 8)))
    assert [len(rung) for rung in rungs] == [3, 2, 2]
    best = rungs[-1][0]
    assert (keep(best), best.difference, best.episodes) == (0.25, 0.0, 96)
    assert best.cost == costs[best.setting]
    assert best.cost.latency_ms < rungs[-1][1].cost.latency_ms
    assert {seed for _, _, seed in played} == {7}
    # Those that surely lose too much ran no more than once.
    worst = list(costs)[-1]
    assert [episodes for setting, episodes, _ in played if setting == worst] == [2]


def test_without_one_the_most_successful_is_left() -> None:
    costs = settings(0.05, 0.1, 0.15, 0.4)
    rungs = list(halve(costs, player(falls, []), max_drop=None, seed=7, rungs=(2, 4)))
    assert [[keep(standing) for standing in rung] for rung in rungs] == [[0.4, 0.15], [0.4, 0.15]]
    alike = list(halve(settings(0.9, 0.6), player(falls, []), max_drop=None, seed=7, rungs=(2,)))
    assert [keep(standing) for standing in alike[0]] == [0.6, 0.9]  # of equal success, the faster


def test_where_all_lose_too_much_nothing_is_left() -> None:
    play = player(lambda setting: 1.0 if setting is None else 0.2, [])
    assert list(halve(settings(0.1, 0.2), play, max_drop=0.05, seed=0)) == [[]]


def test_limits_leave_out_what_costs_more() -> None:
    costs = {
        Setting("w4a8", None): Cost(30.0, 25.0, 80.0, 1000),
        Setting("w4a8", Pruning(0.4, 3)): Cost(20.0, 18.0, 60.0, 1000),
        Setting("w8a8", None): Cost(20.0, 18.0, 60.0, 2000),
    }
    assert CostLimits().within(costs) == costs
    assert list(CostLimits(latency_ms=20).within(costs)) == list(costs)[1:]
    assert list(CostLimits(weight_bytes=1000).within(costs)) == list(costs)[:2]
    assert list(CostLimits(latency_ms=20, weight_bytes=1999).within(costs)) == list(costs)[1:2]
    with pytest.raises(InputError, match=r"the fastest takes 20\.0 ms, the smallest 1000 bytes"):
        CostLimits(latency_ms=19.9).within(costs)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"drop": -0.03}, "must be 0 or more, got -3 points"),
        ({"latency_ms": 0}, "the largest latency must be above 0, got 0"),
        ({"weight_bytes": -1}, "the largest number of bytes must be above 0, got -1"),
    ],
)
def test_limits_that_nothing_can_meet_are_refused(limits: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        CostLimits(**limits)


def test_steps_are_timed_in_turns_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the fake takes as many seconds as its number, by the clock that it moves."""
    now, order = [0.0], []

    class Slow:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def step(self, observation: object, *, seed: int) -> None:
            order.append(self.seconds)
            now[0] += self.seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    quick = step_times([Slow(0.5), Slow(1)], None)  # type: ignore[list-item, arg-type]
    assert quick == [[500.0] * 15, [1000.0] * 15]
    assert order == [0.5, 1] * 16
    assert step_times([Slow(25)], None) == [[25_000.0] * 3]  # type: ignore[list-item, arg-type]
    assert cost_of([3.0, 1.0, 2.0], 7) == Cost(2.0, 1.0, 3.0, 7)


def test_only_shared_episodes_count() -> None:
    standing = compare(
        Setting("w4a8", None),
        COST,
        {("a", 0): True, ("a", 1): True},
        {("a", 1): False, ("b", 1): True},
    )
    assert (standing.episodes, standing.difference) == (1, 1.0)
    assert standing.low < 1 <= standing.high


def test_many_prunings_are_calibrated_as_one(
    policy: sqap.Policy, observe: Callable[[int], sqap.Observation]
) -> None:
    """What a `Repruner` measures once is what `reprune` measures for each setting."""
    frames = [observe(seed) for seed in range(3)]
    small = sqap.compress(policy, QUICK, frames)
    repruner = Repruner(policy, small, frames)
    settings = [None, *(Pruning(keep, after) for after in (1, 2) for keep in (0.5, 0.25))]
    for pruning in [*settings, Pruning(0.5, 1, later=(Cut(2, 0.25),)), Pruning(0.5, 1, method="sqap")]:
        many, one = repruner.prune(pruning), reprune(policy, small, pruning, frames)
        assert (many.recipe, many.calibration) == (one.recipe, one.calibration)


def test_the_command_writes_what_it_has_found_and_goes_on(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake walks alike whatever is pruned, so that the fastest setting of all is found."""
    monkeypatch.chdir(tmp_path)
    ran: list[int] = []
    real = executors.evaluate

    def evaluate(*arguments, **named):
        runs = real(*arguments, load=fakes.load_walker, make=fakes.make, **named)
        ran.append(len(runs[0].records) - len(runs[0].from_log))
        return runs

    monkeypatch.setattr(executors, "evaluate", evaluate)
    monkeypatch.setattr("sqap.tune.KEEPS", (0.5,))
    monkeypatch.setattr("sqap.tune.halve", partial(halve, rungs=(1,)))
    monkeypatch.setattr("sqap.tune.step_times", lambda policies, _: [[9.0 - i] for i in range(len(policies))])
    arguments = ["tune", saved, "--out", "small", "--tasks", "door-open", "--confirm", 3, "--frames", 2]
    arguments += ["--json", "t.json", "--recipe", "recipe.json"]
    (tmp_path / "recipe.json").write_text('{"quantization": {"weight_bits": 8, "activation_bits": 8}}')

    first = CliRunner().invoke(app, [str(a) for a in arguments])

    assert first.exit_code == 0, first.output
    numbers = json.loads((tmp_path / "t.json").read_text())
    assert numbers["limits"] == {"drop": 3.0, "latency_ms": None, "weight_bytes": None}
    assert [standing["cost"]["latency_ms"] for standing in numbers["standings"]] == [7.0, 8.0, 9.0]
    confirmed = numbers["confirmed"]
    assert (confirmed["episodes"], confirmed["setting"]["recipe"]) == (3, "recipe.json")
    small = sqap.load(tmp_path / "small")
    assert small.recipe.quantization == QUICK.quantization
    assert small.recipe.pruning == Pruning(**_read(confirmed["setting"]["pruning"]))
    assert small.calibration is not None
    assert "bears that out" in " ".join(first.output.split())
    card = (tmp_path / "small" / "README.md").read_text()
    assert "on 3 pairs of other seeds +0.0 points" in card
    assert not list(tmp_path.glob(".small*"))  # of what was kept to go on from

    before, ran[:] = list(ran), []
    limited = [*arguments, "--max-latency", 8.5, "--max-bytes", 10**6]
    again = CliRunner().invoke(app, [str(a) for a in limited])
    assert again.exit_code == 0, again.output
    assert "1 of 3 settings are beyond the limits" in again.output
    assert sum(before) > 0
    assert sum(ran) == 0  # all from the logs
    numbers = json.loads((tmp_path / "t.json").read_text())
    assert numbers["limits"] == {"drop": None, "latency_ms": 8.5, "weight_bytes": 10**6}
    assert len(numbers["standings"]) == 2


def _read(pruning: dict) -> dict:
    later = tuple(Cut(**cut) for cut in pruning["later"])
    layers = pruning["score_layers"]
    return {
        **pruning,
        "later": later,
        "ring": tuple(pruning["ring"]),
        "score_layers": layers and tuple(layers),
    }


def test_a_place_that_cannot_be_written_is_refused_first(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done for a place that cannot be taken")

    monkeypatch.setattr("sqap.frames.read_frames", work)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = CliRunner().invoke(app, ["tune", str(saved), "--out", "mine"])
    assert result.exit_code == 1
    assert "mine exists and is not an sqap policy" in " ".join(result.output.split())
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_recipe_with_too_many_bytes_is_not_calibrated(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("pruners were calibrated for a recipe that is out already")

    monkeypatch.setattr(Repruner, "__init__", work)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.json").write_text('{"quantization": {"weight_bits": 8, "activation_bits": 8}}')
    arguments = ["tune", str(saved), "--out", "small", "--frames", "2", "--recipe", "recipe.json"]
    result = CliRunner().invoke(app, [*arguments, "--tasks", "door-open", "--max-bytes", "1000"])
    said = " ".join(result.output.split())
    assert result.exit_code == 1, said
    assert "bytes: no pruning of it is tried" in said
    assert "no setting is within the limits" in said
    assert not (tmp_path / "small").exists()


def test_one_recipe_twice_is_refused(saved: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["tune", str(saved), "--out", str(tmp_path / "small"), "--recipe", "w4a8,w4a8"]
    )
    assert result.exit_code == 1
    assert "names one recipe twice" in " ".join(result.output.split())
