"""LeRobot's policies as LeRobot 0.6.1 computes them, float32: every stage, from the same noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import published_lerobot
import pytest
import torch

import sqap
from sqap.models import ModelInputs
from sqap.models.heads import FlowHead
from sqap.models.heads.velocity import FlowInputs
from sqap.processing import unnormalize

from .conftest import TESTS, MakeUpstream, Upstream

TOLERANCE = {"rtol": 0, "atol": 1e-4}
STAGES = 3  # observations of which every stage was recorded
FAMILIES = ("smolvla", "pi0", "pi05")


@pytest.fixture(params=FAMILIES)
def lerobot(request: pytest.FixtureRequest, upstream: MakeUpstream) -> Upstream:
    return upstream(request.param)


def inputs(lerobot: Upstream, i: int) -> ModelInputs:
    """What our model is given for the i-th observation, whose number is the seed of its noise."""
    return lerobot.policy.inputs(lerobot.observation(i), torch.Generator().manual_seed(i))


def read(lerobot: Upstream, given: ModelInputs) -> tuple[FlowHead, FlowInputs]:
    """The head, and what it reads of the decoder."""
    model = lerobot.policy.model
    assert isinstance(model.head, FlowHead)
    (stream,) = model.decoder.run(model.streams([given], last_tokens=True))
    return model.head, model.head.inputs(model.decoder, stream, model.layout(given), given)


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
        prefix = lerobot.policy.model.embed(given)[0]
        torch.testing.assert_close(prefix[:, ::4], lerobot.arrays[f"prefix.{i}"], **TOLERANCE)
        _, read_by_head = read(lerobot, given)
        for name, found in zip(("keys", "values"), zip(*read_by_head.prefix, strict=True), strict=True):
            expected = lerobot.arrays[f"{name}.{i}"]
            torch.testing.assert_close(torch.cat(found)[..., ::4], expected, **TOLERANCE)


@torch.inference_mode()
def test_every_velocity(lerobot: Upstream) -> None:
    for i in range(STAGES):
        head, given = read(lerobot, inputs(lerobot, i))
        found = torch.cat([head.velocity(*asked) for asked in head.denoising_steps([given])])
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


RELATIVE = json.loads((TESTS / "fixtures" / "relative-actions.json").read_text())["cases"]


@pytest.mark.parametrize("i", range(len(RELATIVE)))
def test_relative_actions(i: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What LeRobot's processors make of a normalised chunk and the state that they have seen."""
    case, rng = RELATIVE[i], np.random.default_rng(i)
    monkeypatch.setattr(published_lerobot, "STATE_DIM", 7)
    names = {"action_feature_names": case["names"]}
    published_lerobot.write_pi(tmp_path, kind=case["kind"], use_relative_actions=True, **names)
    config = sqap.load(tmp_path).config
    state = rng.standard_normal(7).astype(np.float32)
    chunk = rng.standard_normal((6, 7)).astype(np.float32)
    padded = np.pad(chunk, ((0, 0), (0, config.model.head.action_dim - 7)))
    found = unnormalize(padded, config.actions, state)
    np.testing.assert_allclose(found, case["actions"], rtol=0, atol=1e-5)
