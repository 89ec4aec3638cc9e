from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sqap.errors import InputError
from sqap.pruning import Selection, Selector, criteria
from sqap.recipe import Cut, Pruning

METHODS = ("lookahead", "sqap", "attention", "random", "uniform")


@st.composite
def selections(draw: st.DrawFn) -> tuple[Selector, torch.Tensor, Selection]:
    grid = draw(st.integers(1, 10))
    tokens = grid * grid
    keep = draw(st.floats(0.01, 1))
    assume(round(keep * tokens) >= 1)
    top_share = draw(st.floats(0, 1))
    settings = Pruning(
        keep_ratio=keep,
        method=draw(st.sampled_from(METHODS)),
        top_share=top_share,
        ring_share=draw(st.floats(0, 1).filter(lambda share: top_share + share <= 1)),
        ring=draw(st.sampled_from([(0.0, 0.1), (0.05, 0.2), (0.3, 2.0)])),
        rest=draw(st.sampled_from(["random", "farthest"])),
    )
    selector = Selector(settings, grid, draw(st.none() | st.integers(0, tokens)))
    # Few distinct values make ties, as a quantized map does.
    values = st.lists(st.sampled_from([0.0, 1e-30, 0.25, 1.0]), min_size=tokens, max_size=tokens)
    scores = torch.tensor(draw(values))
    target = draw(st.none() | st.tuples(st.floats(-2, 3), st.floats(-2, 3)))
    return selector, scores, selector.select(scores, target, torch.Generator().manual_seed(0))


@given(selections())
def test_the_budget_is_exact_and_every_token_has_one_reason(
    case: tuple[Selector, torch.Tensor, Selection],
) -> None:
    selector, _, selection = case
    assert len(selection.kept) == selector.settings.budget(selector.tokens)
    assert (selection.kept.diff() > 0).all()
    reasons = selection.top.int() + selection.ring.int() + selection.sampled.int()
    assert reasons.max() == 1
    assert torch.equal(reasons.nonzero().flatten(), selection.kept)


@given(selections())
def test_sqap_takes_no_more_than_its_shares(case: tuple[Selector, torch.Tensor, Selection]) -> None:
    selector, scores, selection = case
    settings = selector.settings
    assume(settings.method in ("lookahead", "sqap"))
    top = round(settings.top_share * selector.budget)
    top = top if selector.top_k is None else min(top, selector.top_k)
    assert set(selection.top.nonzero().flatten().tolist()) == set(criteria.top_k(scores, top).tolist())
    assert selection.ring.sum() <= round(settings.ring_share * selector.budget)
    if selection.target is None:
        assert not selection.ring.any()
    else:
        assert not (selection.ring & ~criteria.ring(selector.grid, selection.target, *settings.ring)).any()


def test_a_full_ring_keeps_the_tokens_nearest_to_the_end_effector() -> None:
    settings = Pruning(keep_ratio=0.1, top_share=0, ring=(0.1, 0.5), ring_share=0.25)
    selection = Selector(settings, 10).select(torch.zeros(100), (0.45, 0.45))
    # Patch (4, 4) is within the inner radius; of its eight neighbors two of the nearest four fit.
    assert selection.ring.nonzero().flatten().tolist() == [34, 43]
    assert len(selection.kept) == 10


def test_calibration_limits_how_many_are_kept_by_rank() -> None:
    settings = Pruning(keep_ratio=0.5, top_share=0.5)
    for top_k, expected in ((None, 4), (2, 2), (0, 0), (9, 4)):
        selection = Selector(settings, 4, top_k).select(torch.arange(16.0), (0.5, 0.5))
        assert (int(selection.top.sum()), len(selection.kept)) == (expected, 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_selection_says_where_the_end_effector_is(method: str) -> None:
    selector = Selector(Pruning(method=method), 4)  # type: ignore[arg-type]
    assert selector.select(torch.zeros(16), (0.25, 0.5)).target == (0.25, 0.5)


@pytest.mark.parametrize("method", ["lookahead", "sqap", "random"])
def test_chance_comes_from_the_generator_alone(method: str) -> None:
    settings = Pruning(keep_ratio=0.4, method=method, top_share=0.25)  # type: ignore[arg-type]

    def draw(seed: int) -> list[int]:
        chosen = Selector(settings, 6).select(
            torch.arange(36.0), (0.5, 0.5), torch.Generator().manual_seed(seed)
        )
        return chosen.kept.tolist()

    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize("method", ["lookahead", "sqap"])
def test_the_rest_of_the_budget_is_left_to_chance_or_covers_the_image(method: str) -> None:
    scores, drawn = torch.arange(64.0), {}
    for rest in ("random", "farthest"):
        settings = Pruning(0.25, method=method, top_share=0.5, ring_share=0, rest=rest)  # type: ignore[arg-type]
        selection = Selector(settings, 8).select(scores, None, torch.Generator().manual_seed(0))
        assert selection.top.nonzero().flatten().tolist() == list(range(56, 64))
        drawn[rest] = selection.sampled
    left = ~selection.top
    order = criteria.permutation(64, torch.Generator().manual_seed(0)).tolist()
    expected = [i for i in order if left[i]][:8]
    assert drawn["random"].nonzero().flatten().tolist() == sorted(expected)
    covered = criteria.farthest_points(8, selection.top, 8, torch.Generator().manual_seed(0))
    assert drawn["farthest"].nonzero().flatten().tolist() == sorted(covered.tolist())


def test_two_shares_rounded_up_do_not_overrun_the_budget() -> None:
    # Half of three rounds to two, twice.
    settings = Pruning(keep_ratio=0.75, top_share=0.5, ring=(0.0, 2.0), ring_share=0.5)
    selection = Selector(settings, 2).select(torch.zeros(4), (0.5, 0.5))
    assert (int(selection.top.sum()), int(selection.ring.sum()), len(selection.kept)) == (2, 1, 3)


def test_ring_tokens_already_in_the_top_do_not_use_up_the_ring() -> None:
    scores = torch.zeros(100)
    scores[[34, 43]] = 1.0
    settings = Pruning(keep_ratio=0.1, top_share=0.2, ring=(0.1, 0.5), ring_share=0.2)
    selection = Selector(settings, 10).select(scores, (0.45, 0.45))
    assert selection.top.nonzero().flatten().tolist() == [34, 43]
    assert selection.ring.nonzero().flatten().tolist() == [45, 54]


@given(selections(), st.data())
def test_nothing_that_an_earlier_cut_dropped_comes_back(
    case: tuple[Selector, torch.Tensor, Selection], data: st.DataObject
) -> None:
    selector, scores, _ = case
    assume(selector.settings.method != "uniform")
    order = torch.tensor(data.draw(st.permutations(range(selector.tokens))))
    left = torch.zeros(selector.tokens, dtype=torch.bool)
    left[order[: data.draw(st.integers(selector.budget, selector.tokens))]] = True
    generator = torch.Generator().manual_seed(0)
    selection = selector.select(scores, (0.4, 0.6), generator, left=left)
    assert len(selection.kept) == selector.budget
    assert not (selection.mask & ~left).any()
    worse = scores.clone()
    worse[~left] = 100.0
    again = selector.select(worse, (0.4, 0.6), generator.manual_seed(0), left=left)
    assert torch.equal(again.mask, selection.mask)


def test_a_cut_before_the_last_has_its_own_budget_and_share() -> None:
    settings = Pruning(keep_ratio=0.5, later=(Cut(4, 0.25),))
    selector = Selector(settings, 8, top_k=8)  # half of the last budget
    for cut, budget in ((0, 32), (1, 16)):
        selection = selector.select(torch.arange(64.0), cut=cut)
        assert (len(selection.kept), int(selection.top.sum())) == (budget, budget // 2)


def test_attention_keeps_the_best_and_the_baselines_do_not_look() -> None:
    def kept(method: str, scores: torch.Tensor | None) -> list[int]:
        settings = Pruning(keep_ratio=0.25, method=method)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(5)
        return Selector(settings, 4).select(scores, None, generator).kept.tolist()

    scores = torch.arange(16.0)
    assert kept("attention", scores) == [12, 13, 14, 15]
    ranked = Selector(Pruning(0.25, method="attention"), 4).select(scores, (0.1, 0.2))
    assert ranked.target == (0.1, 0.2)
    assert torch.equal(torch.as_tensor(ranked.scores), scores)
    for method in ("random", "uniform"):
        assert kept(method, scores) == kept(method, None)


@pytest.mark.parametrize("method", ["lookahead", "sqap", "attention"])
def test_ranking_without_scores_is_refused(method: str) -> None:
    selector = Selector(Pruning(method=method), 4)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"'{method}' ranks tokens by attention, but got no scores"):
        selector.select(None)


SQAP = Pruning(method="sqap")


def test_a_missing_target_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    selector = Selector(Pruning(method="sqap"), 4)
    with caplog.at_level(logging.WARNING, logger="sqap"):
        for _ in range(3):
            selector.select(torch.zeros(16))
    assert [(r.name, r.levelname) for r in caplog.records] == [("sqap", "WARNING")]
    assert "end effector" in caplog.text


@pytest.mark.parametrize("settings", [Pruning(method="uniform"), Pruning(), SQAP])
def test_no_warning_where_no_ring_is_missed(settings: Pruning, caplog: pytest.LogCaptureFixture) -> None:
    target = (0.5, 0.5) if settings == SQAP else None
    Selector(settings, 4).select(torch.zeros(16), target)
    assert not caplog.records
