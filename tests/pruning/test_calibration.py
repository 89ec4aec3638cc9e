from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sqap.models import VLA, ModelInputs
from sqap.models.stream import LayerOutput
from sqap.pruning.attention import AttentionWatcher, query_rows
from sqap.pruning.calibration import attention_scores, choose_k, overlap_at_k, overlap_curve


def test_overlap_counts_what_both_rank_high() -> None:
    a, b = torch.tensor([4.0, 3, 2, 1]), torch.tensor([4.0, 1, 2, 3])
    assert [overlap_at_k(a, b, k) for k in (1, 2, 3, 4)] == pytest.approx([1, 1 / 2, 2 / 3, 1])


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 20))
def test_the_curve_is_the_mean_overlap_at_every_k(seed: int, frames: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers from a short range, so that ties occur.
    full, quantized = torch.randint(0, 6, (2, frames, tokens), generator=generator).float()
    expected = [
        sum(overlap_at_k(a, b, k) for a, b in zip(full, quantized, strict=True)) / frames
        for k in range(1, tokens + 1)
    ]
    assert overlap_curve(full, quantized).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("curve", "threshold", "k"),
    [
        ([1.0, 0.9, 0.8, 0.7], 0.8, 3),
        ([0.5, 0.9, 0.6], 0.8, 2),
        ([0.5, 0.4], 0.8, 0),
        ([0.0, 0.0], 0.0, 2),
        ([], 0.5, 0),
    ],
)
def test_k_is_the_largest_that_reaches_the_threshold(curve: list[float], threshold: float, k: int) -> None:
    assert choose_k(torch.tensor(curve), threshold) == k


def test_scores_are_distributions_and_see_the_image(
    model: VLA, pixels: list[Tensor], token_ids: Tensor
) -> None:
    scores = attention_scores(model, [ModelInputs(pixels, token_ids)], (1, 3), "text")
    assert scores.shape == (1, 16)
    assert scores.min() >= 0
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, dtype=scores.dtype))
    other = attention_scores(model, [ModelInputs([1 - pixels[0]], token_ids)], (1, 3), "text")
    assert not torch.allclose(scores, other)


def test_scores_are_what_a_pruner_sees(model: VLA, pixels: list[Tensor], token_ids: Tensor) -> None:
    inputs = ModelInputs(pixels, token_ids)
    watcher = AttentionWatcher((1, 3), query_rows("text", slice(1, 17), 22), slice(1, 17))
    model(replace(inputs, noise=torch.zeros(1, 2, 2)), watcher)
    assert watcher.scores is not None
    torch.testing.assert_close(attention_scores(model, [inputs], (1, 3), "text"), watcher.scores)


def test_a_watcher_remembers_its_own_layers_alone() -> None:
    watcher = AttentionWatcher((1,), query_rows("text", slice(1, 17), 22), slice(1, 17))
    x = torch.zeros(1, 22, 4)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("looked ahead")

    watcher.keep(2, LayerOutput(x, x, torch.ones(1, 22), refuse))
    watcher.keep(1, LayerOutput(x, x, None, refuse))
    assert watcher.scores is None


def test_scores_of_frames_come_in_their_order(model: VLA, pixels: list[Tensor], token_ids: Tensor) -> None:
    frames = [pixels[0], pixels[0].flip(-1)]
    inputs = [ModelInputs([f], token_ids) for f in frames]
    together = attention_scores(model, inputs, (2,), "last")
    alone = [attention_scores(model, [given], (2,), "last") for given in inputs]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(alone[0], alone[1])


def test_scores_of_several_layers_average_their_attention(
    model: VLA, pixels: list[Tensor], token_ids: Tensor
) -> None:
    one, two, both = (
        attention_scores(model, [ModelInputs(pixels, token_ids)], layers, "text")
        for layers in ((0,), (3,), (0, 3))
    )
    # Layers weigh by how much attention they spend on the image at all, so the mean lies in between.
    assert (torch.minimum(one, two) <= both + 1e-7).all()
    assert (both <= torch.maximum(one, two) + 1e-7).all()
    assert not torch.allclose(both, one)
    assert not torch.allclose(both, two)
