"""The published rivals, each against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sqap.errors import InputError
from sqap.pruning import Selector, rivals
from sqap.recipe import Pruning


def features(seed: int, tokens: int, width: int = 6) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def cosines(x: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1)


@given(st.sampled_from(rivals.BY_FEATURES), st.integers(0, 2**31), st.integers(1, 5), st.data())
def test_budgets_are_exact_and_dropped_tokens_have_no_say(
    method: str, seed: int, grid: int, data: st.DataObject
) -> None:
    tokens = grid**2
    left = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any)))
    keep = data.draw(st.integers(1, int(left.sum()))) / tokens
    selector = Selector(Pruning(keep, method=method), grid)  # type: ignore[arg-type]
    x, relevance = features(seed, tokens), features(seed + 1, tokens, 1)[:, 0]
    found = selector.select(relevance, features=x, left=left).mask
    assert int(found.sum()) == selector.budget
    assert not (found & ~left).any()
    x[~left], relevance[~left] = 9.0, 9.0
    assert torch.equal(selector.select(relevance, features=x, left=left).mask, found)


@given(st.integers(0, 2**31), st.integers(2, 20), st.data())
def test_divprune_is_greedy_max_min(seed: int, tokens: int, data: st.DataObject) -> None:
    apart = (1 - cosines(features(seed, tokens))).tolist()
    chosen: list[int] = []
    for picked in rivals.diverse(features(seed, tokens), data.draw(st.integers(1, tokens))).tolist():
        nearest = {
            i: min(apart[i][j] for j in (chosen or range(tokens)) if j != i)
            for i in range(tokens)
            if i not in chosen
        }
        # Two that are each other's nearest tie, but for rounding.
        assert nearest[picked] == pytest.approx(max(nearest.values()), abs=1e-6)
        chosen.append(picked)


def test_dart_keeps_the_largest_and_what_is_least_like_them() -> None:
    x = torch.zeros(20, 2)
    x[:, 0] = 0.1  # alike
    x[3], x[11] = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 1.0])
    pivots = rivals.least_duplicated(x, 1)
    assert pivots.tolist() == [3]
    x[torch.arange(12, 19), 0] = 5.0  # the other pivots, as the first
    found = rivals.least_duplicated(x, 9).tolist()
    assert set(found) == {3, *range(12, 19), 11}


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_cdpruner_adds_most_to_the_determinant(seed: int, count: int) -> None:
    x, relevance = features(seed, 15), features(seed + 1, 15, 1)[:, 0]
    weight = ((relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())).double()
    kernel = weight[:, None] * cosines(x) * weight
    chosen: list[int] = []
    for _ in range(count):
        volumes = {i: kernel[[*chosen, i]][:, [*chosen, i]].logdet() for i in range(15) if i not in chosen}
        chosen.append(max(volumes, key=lambda i: float(volumes[i])))
    assert rivals.determinantal(x, relevance, count).tolist() == chosen


def test_cdpruner_goes_on_by_relevance_where_nothing_is_diverse() -> None:
    relevance = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert rivals.determinantal(torch.ones(4, 3), relevance, 3).tolist() == [1, 3, 2]


def test_relevance_is_the_cosine_to_the_text_behind_the_image() -> None:
    embedded = torch.tensor([[9.0, 9], [1, 0], [0, 1], [2, 2], [3, 0], [5, 0]])
    found = rivals.relevance(embedded, slice(1, 4))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.5**0.5]))


@pytest.mark.parametrize("method", rivals.BY_FEATURES)
def test_a_selection_tells_what_it_went_by(method: str) -> None:
    scores, target = features(1, 16, 1)[:, 0], (0.2, 0.7)
    selector = Selector(Pruning(0.5, method=method), 4)  # type: ignore[arg-type]
    found = selector.select(scores, target, features=features(0, 16))
    assert found.target == target
    assert found.scores is scores
    assert not (found.top | found.ring).any()


def test_cdpruner_needs_relevance() -> None:
    with pytest.raises(InputError, match="'cdpruner' compares the tokens' features, but got none"):
        Selector(Pruning(method="cdpruner"), 4).select(None, features=features(0, 16))


@pytest.mark.parametrize("method", rivals.BY_FEATURES)
def test_no_features_are_refused(method: str) -> None:
    with pytest.raises(InputError, match=f"'{method}' compares the tokens' features, but got none"):
        Selector(Pruning(method=method), 4).select(torch.ones(16))  # type: ignore[arg-type]
