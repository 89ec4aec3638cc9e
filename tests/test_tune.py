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
from sqap.errors import InputError
from sqap.evaluation import executors
from sqap.models import DecoderConfig
from sqap.recipe import Cut, Pruning
from sqap.tune import Outcomes, candidates, compare, decoder_cost, halve
from tests.evaluation import evaluation_fakes as fakes

DECODER = DecoderConfig(
    vocabulary=32, width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, mlp_width=11008
)
TASKS = tuple(f"task {i}" for i in range(12))


def test_candidates_fit_the_policy_and_differ() -> None:
    for depth, tokens in ((32, 256), (6, 64), (2, 4), (1, 16)):
        found = candidates(DecoderConfig(8, 16, depth, 2, 2, 8, 16), tokens)
        assert len({(p.cuts) for p in found}) == len(found)
        assert all(p.last_layer < depth and p.budget(tokens) >= 1 for p in found)
        assert bool(found) == (depth > 1)
    assert Pruning(0.5, 3, later=(Cut(5, 0.25),)) in candidates(DECODER, 256)


def test_cost_is_the_share_of_the_decoders_multiply_adds() -> None:
    layer, look = 4 * 4096 + 3 * 11008, 4096
    one = Pruning(0.25, 8, score_layers=(9, 20))
    assert decoder_cost(one, DECODER) == pytest.approx((8 + 24 * 0.25 + 2 * look / layer) / 32)
    assert decoder_cost(Pruning(0.25, 8, method="random"), DECODER) == pytest.approx((8 + 6) / 32)
    two = Pruning(0.5, 8, later=(Cut(16, 0.25),), score_layers=(20,))
    assert decoder_cost(two, DECODER) == pytest.approx((8 + 4 + 4 + 1.5 * look / layer) / 32)


def player(rates: Callable[[Pruning | None], float], played: list[tuple[Pruning | None, int, int]]):
    """Outcomes with a rate of success for each setting; every episode has a difficulty of its own."""

    def play(pruning: Pruning | None, episodes: int, seed: int) -> Outcomes:
        played.append((pruning, episodes, seed))
        keys = [(task, seed + i) for task in TASKS for i in range(episodes)]
        return {key: random.Random(str(key)).random() < rates(pruning) for key in keys}

    return play


def test_the_cheapest_that_loses_little_is_left() -> None:
    """Success falls with the tokens that are kept; from 0.25 on it is that of the policy without pruning."""
    played: list[tuple[Pruning | None, int, int]] = []
    settings = [Pruning(keep, 3, method="random") for keep in (0.9, 0.8, 0.6, 0.4, 0.25, 0.15, 0.1, 0.05)]

    def rate(pruning: Pruning | None) -> float:
        return 0.9 if pruning is None or pruning.keep_ratio >= 0.25 else 2 * pruning.keep_ratio

    rungs = list(halve(settings, DECODER, player(rate, played), max_drop=0.03, seed=7, rungs=(2, 4, 8)))
    assert [len(rung) for rung in rungs] == [3, 2, 2]
    best = rungs[-1][0]
    assert (best.pruning.keep_ratio, best.difference, best.episodes) == (0.25, 0.0, 96)
    assert best.cost < rungs[-1][1].cost
    assert {seed for _, _, seed in played} == {7}
    # Those that surely lose too much ran no more than once.
    assert [episodes for pruning, episodes, _ in played if pruning == settings[-1]] == [2]


def test_where_all_lose_too_much_nothing_is_left() -> None:
    rungs = list(
        halve(
            [Pruning(0.1, 3), Pruning(0.1, 5)],
            DECODER,
            player(lambda pruning: 1.0 if pruning is None else 0.2, []),
            max_drop=0.05,
            seed=0,
        )
    )
    assert rungs == [[]]


def test_a_negative_drop_is_refused() -> None:
    with pytest.raises(InputError, match="must be 0 or more, got -3 points"):
        next(halve([Pruning()], DECODER, player(lambda _: 1.0, []), max_drop=-0.03, seed=0))


def test_only_shared_episodes_count() -> None:
    standing = compare(
        Pruning(0.5, 3), DECODER, {("a", 0): True, ("a", 1): True}, {("a", 1): False, ("b", 1): True}
    )
    assert (standing.episodes, standing.difference) == (1, 1.0)
    assert standing.low < 1 <= standing.high


def test_the_command_writes_what_it_has_found_and_goes_on(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake walks alike whatever is pruned, so that the cheapest setting of all is found."""
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
    arguments = ["tune", saved, "--out", "small", "--tasks", "door-open", "--confirm", 3, "--frames", 2]
    arguments += ["--json", "t.json", "--recipe", "recipe.json"]
    (tmp_path / "recipe.json").write_text('{"quantization": {"weight_bits": 8, "activation_bits": 8}}')

    first = CliRunner().invoke(app, [str(a) for a in arguments])

    assert first.exit_code == 0, first.output
    numbers = json.loads((tmp_path / "t.json").read_text())
    costs = [standing["cost"] for standing in numbers["standings"]]
    assert costs == sorted(costs)
    assert numbers["confirmed"]["episodes"] == 3
    small = sqap.load(tmp_path / "small")
    assert small.recipe.pruning == Pruning(**_read(numbers["confirmed"]["pruning"]))
    assert small.calibration is not None
    assert "bears that out" in " ".join(first.output.split())
    card = (tmp_path / "small" / "README.md").read_text()
    assert "on 3 pairs of other seeds +0.0 points" in card
    assert "The original itself was not run." in card

    before, ran[:] = list(ran), []
    again = CliRunner().invoke(app, [str(a) for a in arguments])
    assert again.exit_code == 0, again.output
    assert sum(before) > 0
    assert sum(ran) == 0  # all from the logs


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
