"""Before and after the model, to the bit where the authors' pipelines are known to the bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from sqap.errors import InputError
from sqap.models import VisionConfig
from sqap.processing import (
    ActionStatistics,
    ProprioStatistics,
    center_crop,
    normalize_proprio,
    pixel_values,
    prompt_ids,
    unnormalize,
)


def noise(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "area", "sha256"),
    [
        (224, 0.9, "5492e6ce731613b4"),
        (224, 0.5, "9a01d9e6b03288c5"),
        (56, 0.9, "25fdbec0d9a739d2"),
        (56, 0.5, "f32d4d5b9c4d58a1"),
        (17, 0.9, "4d1a05dcfe32d036"),
    ],
)
def test_a_central_crop_is_tensorflows(size: int, area: float, sha256: str) -> None:
    """Bytes of TensorFlow 2.21's crop_and_resize on the same noise, as OpenVLA's evaluation calls it."""
    cropped = center_crop(noise(size), area)
    assert cropped.shape == (size, size, 3)
    assert hashlib.sha256(cropped.tobytes()).hexdigest().startswith(sha256)


def test_pixels_are_of_the_crop() -> None:
    vision = VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2, mlp_width=32)
    image = noise(32)
    assert torch.equal(pixel_values(image, vision, 0.9), pixel_values(center_crop(image, 0.9), vision))
    assert not torch.equal(pixel_values(image, vision, 0.9), pixel_values(image, vision))


def test_tokens_behind_the_prompt_are_not_repeated() -> None:
    tokenizer = Tokenizer(models.WordLevel({"pick": 3, "x": 7, "?": 8}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for append, expected in [((), [3]), ((7,), [3, 7]), ((7, 2), [3, 7, 2])]:
        assert prompt_ids("PICK", "{instruction}", tokenizer, append).tolist() == [expected]
    for append, expected in [((7,), [3, 7]), ((7, 2), [3, 7, 2]), ((2,), [3, 7, 2])]:
        assert prompt_ids("pick", "{instruction} x", tokenizer, append).tolist() == [expected]


def test_the_state_is_scaled_and_clipped_where_the_mask_says() -> None:
    statistics = ProprioStatistics((-2.0, 0.0, 0.0), (2.0, 4.0, 1.0), (True, True, False))
    state = normalize_proprio(np.array([1.0, 8.0, 0.3]), statistics)
    np.testing.assert_allclose(state, [[0.5, 1.0, 0.3]], rtol=1e-6)
    with pytest.raises(InputError, match="a state of 3 numbers, got 2"):
        normalize_proprio(np.zeros(2), statistics)


def test_actions_are_cut_only_where_the_family_does() -> None:
    low, high, mask = (-1.0, -1.0), (3.0, 3.0), (True, True)
    actions = np.array([[2.0, -2.0]])
    assert unnormalize(actions, ActionStatistics(low, high, mask)).tolist() == [[3.0, -1.0]]
    assert unnormalize(actions, ActionStatistics(low, high, mask, clip=False)).tolist() == [[5.0, -3.0]]
    assert actions.tolist() == [[2.0, -2.0]]
