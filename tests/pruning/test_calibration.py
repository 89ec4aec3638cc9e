from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sqap.models import VLA
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
    scores = attention_scores(model, pixels, token_ids, (1, 3), "text")
    assert scores.shape == (1, 16)
    assert scores.min() >= 0
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, dtype=scores.dtype))
    other = attention_scores(model, [1 - pixels[0]], token_ids, (1, 3), "text")
    assert not torch.allclose(scores, other)


def test_scores_treat_a_batch_as_its_frames(model: VLA, pixels: list[Tensor], token_ids: Tensor) -> None:
    frames = [pixels[0], pixels[0].flip(-1)]
    batch = attention_scores(model, [torch.cat(frames)], token_ids.expand(2, -1), (2,), "last")
    alone = [attention_scores(model, [f], token_ids, (2,), "last") for f in frames]
    torch.testing.assert_close(batch, torch.cat(alone))


def test_scores_of_several_layers_average_their_attention(
    model: VLA, pixels: list[Tensor], token_ids: Tensor
) -> None:
    one, two, both = (
        attention_scores(model, pixels, token_ids, layers, "text") for layers in ((0,), (3,), (0, 3))
    )
    # Layers weigh by how much attention they spend on the image at all, so the mean lies in between.
    assert (torch.minimum(one, two) <= both + 1e-7).all()
    assert (both <= torch.maximum(one, two) + 1e-7).all()
    assert not torch.allclose(both, one)
    assert not torch.allclose(both, two)
