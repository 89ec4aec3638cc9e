"""Before and after the model, to the bit where the authors' pipelines are known to the bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


@pytest.mark.parametrize("shape", [(48, 80), (32, 80), (80, 32), (20, 24)])
def test_images_of_another_size_are_resized_as_pil_does(shape: tuple[int, int]) -> None:
    """PyTorch's antialiased bicubic is PIL's, but for rounding between its two passes."""
    vision = VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2, mlp_width=32)
    # Levels that no pass overshoots.
    image = np.random.default_rng(0).integers(64, 192, (*shape, 3), dtype=np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(planes, (32, 32), mode="bicubic", antialias=True).clamp(0, 255)
    levels = (pixel_values(image, vision) + 1) / 2 * 255
    assert levels.shape == (1, 3, 32, 32)
    assert (levels - resized).abs().max() < 2


def test_pixels_are_normalised_by_channel() -> None:
    vision = VisionConfig(8, 4, 16, 1, 2, 32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    pixels = pixel_values(np.full((8, 8, 3), (255, 51, 0), dtype=np.uint8), vision)
    assert pixels.dtype == torch.float32
    expected = torch.tensor([1.8, 0.0, -1.5]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(pixels, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", [0, 255])
def test_the_ends_of_the_range_survive_a_crop(level: int) -> None:
    image = np.full((17, 17, 3), level, dtype=np.uint8)
    assert np.array_equal(center_crop(image, 0.7), image)


def test_tokens_behind_the_prompt_are_not_repeated() -> None:
    tokenizer = Tokenizer(models.WordLevel({"pick": 3, "x": 7, "?": 8}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for append, expected in [((), [3]), ((7,), [3, 7]), ((7, 2), [3, 7, 2])]:
        assert prompt_ids("PICK", "{instruction}", tokenizer, append).tolist() == [expected]
    for append, expected in [((7,), [3, 7]), ((7, 2), [3, 7, 2]), ((2,), [3, 7, 2])]:
        assert prompt_ids("pick", "{instruction} x", tokenizer, append).tolist() == [expected]
    for append, expected in [((7,), [8, 3, 7]), ((7, 2), [8, 3, 7, 2]), ((3, 7, 2), [8, 3, 7, 2])]:
        assert prompt_ids("pick", "to {instruction} x", tokenizer, append).tolist() == [expected]


def test_an_instruction_that_cannot_be_encoded_is_said() -> None:
    tokenizer = Tokenizer(models.WordLevel({"pick": 3}, unk_token="?"))
    with pytest.raises(InputError, match=r"the tokenizer cannot encode 'Put': .*UNK"):
        prompt_ids("Put", "{instruction}", tokenizer)


def test_the_state_is_scaled_and_clipped_where_the_mask_says() -> None:
    statistics = ProprioStatistics((-2.0, 0.0, 0.0), (2.0, 4.0, 1.0), (True, True, False))
    for given, expected in [((1.0, 8.0, 0.3), (0.5, 1.0, 0.3)), ((-9.0, 1.0, -1.4), (-1.0, -0.5, -1.0))]:
        state = normalize_proprio(np.array(given), statistics)
        assert state.dtype == torch.float32
        np.testing.assert_allclose(state, [expected], rtol=1e-6)
    with pytest.raises(InputError, match="a state of 3 numbers, got 2"):
        normalize_proprio(np.zeros(2), statistics)


def test_a_state_that_never_varied_is_divided_by_a_hundred_millionth() -> None:
    """OpenVLA-OFT adds 1e-8 to every range."""
    statistics = ProprioStatistics((0.0, 0.0), (0.0, 0.0), (True, True))
    state = normalize_proprio(np.array([0.0, 5e-9]), statistics)
    np.testing.assert_allclose(state, [[-1.0, 0.0]], atol=1e-6)


def test_a_masked_dimension_is_the_action_itself() -> None:
    statistics = ActionStatistics(low=(2.0, 5.0), high=(4.0, 9.0), mask=(True, False))
    actions = unnormalize(np.array([[0.25, 0.3], [-1.0, -0.7]]), statistics)
    assert actions.dtype == np.float32
    assert np.array_equal(actions, np.array([[3.25, 0.3], [2.0, -0.7]], dtype=np.float32))


@pytest.mark.parametrize("clip", [True, False])
def test_a_binarized_gripper_is_open_from_one_half_on(clip: bool) -> None:
    given = np.array([[0.5, np.nextafter(0.5, 0)], [-1.0, 0.50001], [1.0, 0.0]])
    before = given.copy()
    statistics = ActionStatistics((0.0,) * 2, (1.0, 4.0), (False, False), binarize=(0, 1), clip=clip)
    assert unnormalize(given, statistics).tolist() == [[1, 0], [0, 1], [1, 0]]
    assert np.array_equal(given, before)
    # Before its bounds, as CogACT does: 0 is then the middle between them.
    scaled = ActionStatistics((0.0,) * 2, (1.0, 4.0), (True, True), binarize=(1,), clip=clip)
    assert unnormalize(given, scaled).tolist() == [[0.75, 2], [0, 4], [1, 2]]


def test_actions_are_cut_only_where_the_family_does() -> None:
    low, high, mask = (-1.0, -1.0), (3.0, 3.0), (True, True)
    actions = np.array([[2.0, -2.0]])
    assert unnormalize(actions, ActionStatistics(low, high, mask)).tolist() == [[3.0, -1.0]]
    assert unnormalize(actions, ActionStatistics(low, high, mask, clip=False)).tolist() == [[5.0, -3.0]]
    assert actions.tolist() == [[2.0, -2.0]]
