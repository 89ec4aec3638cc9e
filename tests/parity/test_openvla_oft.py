"""OpenVLA-OFT as its authors' classes compute it, float32: one to three cameras, the state, FiLM."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sqap.models.heads import RegressionHead
from sqap.processing import Crop, cropped

from .conftest import TESTS, MakeUpstream, Upstream

TOLERANCE = {"rtol": 0, "atol": 1e-4}
# What a robot's policy reads: cameras, numbers of its state, and whether the instruction modulates vision.
PLATFORMS = {"oft-libero": (2, 8, False), "oft-aloha": (3, 14, True), "oft-bridge": (1, None, False)}
STRIDES = {"oft-libero": 1, "oft-aloha": 7, "oft-bridge": 1}  # of the hidden states that were recorded


@pytest.fixture(params=PLATFORMS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def oft(upstream: MakeUpstream, name: str) -> Upstream:
    """Without the central crop: upstream's needs TensorFlow, and is compared by itself."""
    found = upstream(name)
    found.policy.config = dataclasses.replace(
        found.policy.config, images=tuple(cropped(steps, 1.0) for steps in found.policy.config.images)
    )
    return found


def test_what_is_read(oft: Upstream, name: str) -> None:
    model = oft.policy.config.model
    film = [vision.film for vision in model.vision]
    assert (model.cameras, model.proprio_dim, film[0]) == PLATFORMS[name]
    assert len(set(film)) == 1
    assert not model.decoder.causal


@torch.inference_mode()
def test_visual_tokens(oft: Upstream) -> None:
    model = oft.policy.model
    for i, expected in enumerate(oft.arrays["visual"]):
        inputs = oft.inputs(i)
        visual = model.see(inputs.pixels, model.language(inputs.token_ids))
        torch.testing.assert_close(visual[0, :, ::4], expected, **TOLERANCE)


def test_the_state_is_normalised(oft: Upstream) -> None:
    for i, expected in enumerate(oft.arrays.get("proprio_normalized", [])):
        proprio = oft.inputs(i).proprio
        assert proprio is not None
        torch.testing.assert_close(proprio[0].double(), expected, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_hidden_states(oft: Upstream, name: str) -> None:
    model = oft.policy.model
    assert isinstance(model.head, RegressionHead)
    for i, expected in enumerate(oft.arrays["hidden"]):
        hidden = model.decoder(model.embed(oft.inputs(i)))
        read = model.head.gather(hidden, model.layout(oft.inputs(i))).reshape(-1, hidden.shape[-1])
        torch.testing.assert_close(read[:: STRIDES[name], ::8], expected, **TOLERANCE)


@torch.inference_mode()
def test_actions(oft: Upstream) -> None:
    for i, expected in enumerate(oft.arrays["normalized"]):
        torch.testing.assert_close(oft.policy.model(oft.inputs(i))[0], expected, **TOLERANCE)
        found = oft.policy.act(oft.observation(i))
        np.testing.assert_allclose(found, oft.arrays["actions"][i], rtol=0, atol=1e-4)


def test_the_central_crop_is_tensorflows() -> None:
    """Of the authors' function, on noise of several grains."""
    notes = json.loads((TESTS / "fixtures" / "oft-crop.json").read_text())
    cropped = load_file(TESTS / "fixtures" / "oft-crop.safetensors")
    for case in notes["cases"]:
        block, shape = case["block"], (case["height"] // case["block"], case["width"] // case["block"], 3)
        noise = np.random.default_rng(case["seed"]).integers(0, 256, shape, dtype=np.uint8)
        image = noise.repeat(block, 0).repeat(block, 1)
        expected = cropped[f"cropped.{case['seed']}"].numpy()
        assert np.array_equal(Crop(0.9)(image)[::8, ::8], expected)
