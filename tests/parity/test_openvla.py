"""OpenVLA as its authors' class computes it: transformers 4.40.1, timm 0.9.10, float32."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sqap.models.heads import TokenHead
from sqap.models.kv import KVCache

from .conftest import MakeUpstream, Upstream

TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def openvla(upstream: MakeUpstream) -> Upstream:
    return upstream("openvla")


def test_images_are_resized_to_the_byte(openvla: Upstream) -> None:
    for i, expected in enumerate(openvla.notes["resized_sha256"]):
        (image,) = openvla.observation(i).images.values()
        resized = np.asarray(Image.fromarray(image).resize((56, 56), Image.Resampling.BICUBIC))
        assert hashlib.sha256(resized.tobytes()).hexdigest() == expected


def test_pixels_and_prompts(openvla: Upstream) -> None:
    for i, expected in enumerate(openvla.arrays["pixels"]):
        pixels = torch.cat(list(openvla.inputs(i).pixels), dim=1)[0, :, ::7, ::7]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    for i, ids in enumerate(openvla.notes["prompt_ids"]):
        found = openvla.inputs(i).token_ids[0].tolist()
        assert found == [*ids, 29871]


@torch.inference_mode()
def test_visual_tokens(openvla: Upstream) -> None:
    model: Any = openvla.policy.model
    for i, (features, visual) in enumerate(
        zip(openvla.arrays["features"], openvla.arrays["visual"], strict=True)
    ):
        pixels = openvla.inputs(i).pixels
        seen = torch.cat([encoder(p) for encoder, p in zip(model.vision, pixels, strict=True)], dim=-1)
        torch.testing.assert_close(seen[0, :, ::4], features, **TOLERANCE)
        torch.testing.assert_close(model.see(pixels)[0, :, ::4], visual, **TOLERANCE)


@torch.inference_mode()
def test_logits(openvla: Upstream) -> None:
    model = openvla.policy.model
    assert isinstance(model.head, TokenHead)
    for i, expected in enumerate(openvla.arrays["step_logits"]):
        cache = KVCache(len(model.decoder.layers))
        hidden = model.decoder(model.embed(openvla.inputs(i)), cache=cache)[:, -1:]
        for step, logits in enumerate(expected):
            found = model.head.lm_head(hidden)[0, 0]
            torch.testing.assert_close(found[31744:32000], logits, **TOLERANCE)
            if step == 0:
                first = torch.cat([found[:64], found[31968:]])
                torch.testing.assert_close(first, openvla.arrays["first_logits"][i], **TOLERANCE)
            hidden = model.decoder(model.decoder.embed(found.argmax()[None, None]), cache=cache)


@torch.inference_mode()
def test_a_hundred_observations_give_the_same_tokens(openvla: Upstream) -> None:
    model = openvla.policy.model
    assert isinstance(model.head, TokenHead)
    prompts = (model.head.read(model.decoder, model.embed(openvla.inputs(i))) for i in range(100))
    ids = [model.head.generate(model.decoder, prompt)[0] for prompt in prompts]
    assert torch.equal(torch.stack(ids).int(), openvla.arrays["ids"])
    assert len(openvla.arrays["ids"].unique()) > 100


def test_actions(openvla: Upstream, upstream: MakeUpstream) -> None:
    for i in range(20):
        found = openvla.policy.act(openvla.observation(i))
        np.testing.assert_allclose(found[0], openvla.arrays["actions"][i], rtol=0, atol=1e-6)
    other = upstream("openvla", unnorm_key="fractal20220817_data")
    for i, expected in enumerate(other.arrays["actions_fractal"]):
        np.testing.assert_allclose(other.policy.act(other.observation(i))[0], expected, rtol=0, atol=1e-6)


def test_a_native_checkpoint_is_the_same_family(upstream: MakeUpstream) -> None:
    """OpenVLA as it comes out of training, in Prismatic's layout."""
    native = upstream("native-openvla")
    for i, expected in enumerate(native.arrays["actions"]):
        found = native.policy.act(native.observation(i))
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-6)
