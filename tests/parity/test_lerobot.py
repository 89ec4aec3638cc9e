"""LeRobot's policies as LeRobot 0.6.1 computes them, float32: every stage, from the same noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sqap.models import ModelInputs
from sqap.models.heads import FlowHead

from .conftest import MakeUpstream, Upstream

TOLERANCE = {"rtol": 0, "atol": 1e-4}
STAGES = 3  # observations of which every stage was recorded
FAMILIES = ("smolvla",)


@pytest.fixture(params=FAMILIES)
def lerobot(request: pytest.FixtureRequest, upstream: MakeUpstream) -> Upstream:
    return upstream(request.param)


def inputs(lerobot: Upstream, i: int) -> ModelInputs:
    """What our model is given for the i-th observation, whose number is the seed of its noise."""
    return lerobot.policy.inputs(lerobot.observation(i), torch.Generator().manual_seed(i))


def read(lerobot: Upstream, given: ModelInputs) -> tuple[Tensor, Any]:
    """The decoder's input, and what the head makes of its keys and values."""
    model = lerobot.policy.model
    (stream,) = model.decoder.run(model.streams([given], tails=True))
    state = model.head.state(model.decoder, stream, model.layout(given), given.noise)
    return model.embed(given)[0], state


def test_prompts(lerobot: Upstream) -> None:
    for i, ids in enumerate(lerobot.notes["prompt_ids"]):
        assert inputs(lerobot, i).token_ids[0].tolist() == ids


def test_the_noise_of_a_seed(lerobot: Upstream) -> None:
    head = lerobot.policy.config.model.head
    expected = torch.randn(1, head.horizon, 32, generator=torch.Generator("cpu").manual_seed(5))
    assert torch.equal(inputs(lerobot, 5).noise, expected)


@torch.inference_mode()
def test_pixels_prefix_keys_and_values(lerobot: Upstream) -> None:
    for i in range(STAGES):
        given = inputs(lerobot, i)
        pixels = given.pixels[0][:, :, ::5, ::7][..., ::3]
        torch.testing.assert_close(pixels, lerobot.arrays[f"pixels.{i}"], rtol=0, atol=1e-6)
        prefix, state = read(lerobot, given)
        torch.testing.assert_close(prefix[:, ::4], lerobot.arrays[f"prefix.{i}"], **TOLERANCE)
        for name, found in zip(("keys", "values"), zip(*state[0], strict=True), strict=True):
            expected = lerobot.arrays[f"{name}.{i}"]
            torch.testing.assert_close(torch.cat(found)[..., ::4], expected, **TOLERANCE)


@torch.inference_mode()
def test_every_velocity(lerobot: Upstream) -> None:
    head = lerobot.policy.model.head
    assert isinstance(head, FlowHead)
    for i in range(STAGES):
        _, state = read(lerobot, inputs(lerobot, i))
        found = torch.cat([head.answer(question) for question in head.questions([state])])
        torch.testing.assert_close(found, lerobot.arrays[f"velocities.{i}"], **TOLERANCE)


@torch.inference_mode()
def test_chunks_and_robot_units(lerobot: Upstream) -> None:
    for i, (chunk, actions) in enumerate(
        zip(lerobot.arrays["chunk"], lerobot.arrays["actions"], strict=True)
    ):
        found = lerobot.policy.model(inputs(lerobot, i))[0]
        torch.testing.assert_close(found, chunk, **TOLERANCE)
        acted = lerobot.policy.act(lerobot.observation(i), seed=i)
        np.testing.assert_allclose(acted, actions, rtol=0, atol=1e-4)
    assert len(lerobot.arrays["chunk"]) == 20


def test_old_versions_of_smolvla_act_the_same(upstream: MakeUpstream) -> None:
    """Statistics among the weights of a compiled model, and no processor files."""
    old = upstream("smolvla", old=True)
    for i, expected in enumerate(old.arrays["actions"][:5]):
        np.testing.assert_allclose(old.policy.act(old.observation(i), seed=i), expected, rtol=0, atol=1e-4)
