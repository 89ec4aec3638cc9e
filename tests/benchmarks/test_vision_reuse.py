"""A vision encoder that keeps features: which patches it computes, and what becomes of the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reuse import Reuse, ReusingEncoder, noisy
from torch import Tensor
from vision_reuse import relative

from sqap import Observation
from sqap.models import VisionConfig
from sqap.models.vision import VisionEncoder

GRID, PATCH = 8, 4
LEVEL = 1 / 127.5  # of 8 bits, in normalised pixels
ALWAYS = Reuse(threshold=2.0, ranked=0.25, refresh=1000, cut=1.0)


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    torch.manual_seed(0)
    sizes = VisionConfig(GRID * PATCH, PATCH, 16, 3, 2, 32, class_token=True, registers=2)
    return VisionEncoder(sizes).eval().requires_grad_(False)


def image(seed: int = 0) -> Tensor:
    return torch.rand(1, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(seed)) - 0.5


def look(reusing: ReusingEncoder, pixels: Tensor, scores: Tensor | None = None) -> Tensor:
    """One more step, after which look-ahead ranks by ``scores``."""
    features = reusing(pixels)
    assert reusing.after is not None
    reusing.before = replace(reusing.after, scores=scores)
    return features


def test_what_is_computed_beside_unchanged_patches_is_exact(encoder: VisionEncoder) -> None:
    reusing, pixels = ReusingEncoder(encoder, replace(ALWAYS, attend="all")), image()
    for step in range(5):  # others are computed each time
        scores = torch.rand(GRID**2, generator=torch.Generator().manual_seed(step))
        features = look(reusing, pixels, scores)
        assert reusing.computed == (GRID**2 // 4 if step else GRID**2)
        torch.testing.assert_close(features, encoder(pixels), rtol=0, atol=1e-5)


def test_patches_alone_are_an_image_of_their_own(encoder: VisionEncoder) -> None:
    reusing, pixels = ReusingEncoder(encoder, replace(ALWAYS, attend="fresh")), image()
    before = look(reusing, pixels)
    pixels = pixels.clone()
    pixels[..., :PATCH, :] += 0.5  # the first row
    after = look(reusing, pixels)
    assert reusing.computed == GRID
    assert torch.equal(after[:, GRID:], before[:, GRID:])
    x = encoder.embed(pixels)[:, : 3 + GRID]  # behind the class token and the registers
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(after[:, :GRID], encoder.features(x))


def test_a_slow_change_adds_up_until_the_patch_is_computed(encoder: VisionEncoder) -> None:
    reusing, counts = ReusingEncoder(encoder, ALWAYS), []
    for step in range(6):
        pixels = image()
        pixels[..., :PATCH, :PATCH] += 0.75 * step * LEVEL
        look(reusing, pixels)
        counts.append(reusing.computed)
    assert counts == [GRID**2, 0, 0, 1, 0, 0]


def test_every_fourth_step_and_a_cut_compute_all(encoder: VisionEncoder) -> None:
    reusing, counts = ReusingEncoder(encoder, replace(ALWAYS, refresh=4, cut=0.5)), []
    for seed in (0, 0, 0, 0, 0, 0, 1):
        features = look(reusing, image(seed))
        counts.append(reusing.computed)
    assert counts == [GRID**2, 0, 0, 0, GRID**2, 0, GRID**2]
    assert torch.equal(features, encoder(image(1)))


def test_the_patches_of_a_token_that_was_ranked_high_are_computed(encoder: VisionEncoder) -> None:
    reusing = ReusingEncoder(encoder, replace(ALWAYS, ranked=1 / 16), shuffle=2)
    scores = torch.zeros(GRID**2 // 4)
    scores[5] = 1.0  # the second row's second of four
    look(reusing, image(), scores)
    reusing.before = replace(reusing.before, features=torch.zeros_like(reusing.before.features))
    features = look(reusing, image())
    computed = features.norm(dim=-1).view(GRID, GRID) > 0
    assert computed[2:4, 2:4].all()
    assert reusing.computed == computed.sum() == 4


def test_memory_of_a_step_is_left_as_it_was(encoder: VisionEncoder) -> None:
    reusing = ReusingEncoder(encoder, replace(ALWAYS, attend="all"))
    look(reusing, image())
    kept = reusing.before
    tensors = kept.pixels, kept.features, kept.rows, *kept.inputs
    copies = [tensor.clone() for tensor in tensors]
    first = reusing(image(1))
    assert all(map(torch.equal, tensors, copies))
    reusing.before = kept
    assert torch.equal(reusing(image(1)), first)


def test_noise_is_drawn_by_the_seed_and_kept_in_8_bits() -> None:
    seen = Observation({"front": np.full((64, 64, 3), 128, np.uint8)}, "go")
    found = [noisy(seen, 2.0, seed).images["front"] for seed in (1, 1, 2)]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert found[0].dtype == np.uint8
    assert 1.9 < found[0].astype(float).std() < 2.1


def test_an_error_is_relative_to_the_spread_of_what_is_meant() -> None:
    meant = np.array([[0.0, 10.0], [2.0, 10.0]])
    assert relative([meant + 1], [meant]) == pytest.approx(2**0.5)  # variances are 1 and 0
