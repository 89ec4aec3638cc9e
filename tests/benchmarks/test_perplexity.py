"""The text, its windows and the measure that every model is put to."""

from __future__ import annotations

import itertools
import math
import pydoc_data.topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perplexity import CALIBRATION, EVALUATION, perplexity, split_text, windows


def test_no_paragraph_is_calibrated_and_evaluated_on() -> None:
    topics = dict.fromkeys(CALIBRATION + EVALUATION, "Everywhere.")
    topics[CALIBRATION[0]] = "One.\n\nShared.\n\nTwo."
    topics[EVALUATION[0]] = "Three.\n\n\nShared.\n\nFour.\n\nThree."
    calibration, evaluation = split_text(topics)
    assert calibration == "One.\n\nShared.\n\nTwo.\n\nEverywhere."
    assert evaluation == "Three.\n\nFour."


def test_this_pythons_documentation_has_the_topics_and_enough_of_them() -> None:
    calibration, evaluation = split_text(pydoc_data.topics.topics)
    assert not set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))
    assert min(len(calibration), len(evaluation)) > 90_000  # at about four characters a token


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 40))
def test_windows_are_stretches_that_share_no_token(length: int, count: int, spare: int) -> None:
    found = windows(torch.arange(length * count + spare), length, count)
    assert found.shape == (count, length)
    assert len(found.unique()) == count * length
    if length > 1:
        assert (found.diff(dim=1) == 1).all()


def test_windows_reach_from_the_beginning_to_the_end() -> None:
    assert windows(torch.arange(100), 10, 5)[:, 0].tolist() == [0, 20, 40, 60, 80]


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="29 tokens hold 2 windows of 10, not 3"):
        windows(torch.arange(29), 10, 3)


def test_knowing_nothing_is_as_perplexing_as_the_vocabulary_is_large() -> None:
    ids = torch.randint(0, 7, (3, 11), generator=torch.Generator().manual_seed(0))
    assert perplexity(lambda ids: torch.zeros(*ids.shape, 7), ids) == pytest.approx(7)


def test_it_is_the_probability_given_to_each_token_but_the_first() -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 5, (9, 6), generator=generator)  # more windows than a batch holds
    table = torch.randn(5, 5, generator=generator)
    probabilities = table.softmax(-1)
    nll = [-math.log(probabilities[a, b]) for row in ids for a, b in itertools.pairwise(row)]
    assert perplexity(lambda batch: table[batch], ids) == pytest.approx(
        math.exp(sum(nll) / len(nll)), rel=1e-5
    )


def test_progress_counts_the_windows() -> None:
    seen: list[tuple[int, int]] = []
    ids = torch.zeros(6, 3, dtype=torch.long)
    perplexity(lambda ids: torch.zeros(*ids.shape, 2), ids, lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]
