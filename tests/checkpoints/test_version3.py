"""``policy.json`` of version 3, as it was stored before processing was lists of steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import sqap
from sqap import Observation, Policy
from sqap.checkpoints import BUNDLED
from sqap.config import PolicyConfig
from sqap.errors import CheckpointError
from sqap.processing import (
    ActionUnits,
    Binarize,
    Clamp,
    Crop,
    Lower,
    Normalize,
    PromptConfig,
    Range,
    Scale,
    Stretch,
    Template,
    cropped,
    stretched,
    unnormalize,
)
from tests.families import family_config, random_model

STORED = Path(__file__).parents[1] / "fixtures" / "policy-version3.json"


def tokenizer() -> Tokenizer:
    words = {"<unk>": 0, "open": 1, "the": 2, "drawer?": 3, "out:": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


@pytest.fixture
def stored() -> dict[str, Any]:
    """The policy of OpenVLA-OFT's kind, and what version 3's code made of the numbers below."""
    found: dict[str, Any] = json.loads(STORED.read_text())
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A policy with the same model, in the version that is written now."""
    config = family_config("regression")
    images = tuple(stretched(vision.image_size) for vision in config.vision)
    bounds = Range((0.0,) * 5, (1.0,) * 5, (True,) * 5)
    actions = (Range((0.0,) * 4, (1.0,) * 4, (True,) * 4),)
    about = PolicyConfig("small", config, ("front", "wrist"), images, actions, state=(bounds,))
    Policy(random_model(config), about, tokenizer()).save(tmp_path / "policy")
    return tmp_path / "policy"


def rewrite(directory: Path, policy: Any) -> None:
    path = directory / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3, "policy": policy}))


def test_it_is_read_as_the_same_policy(directory, stored):
    model = sqap.load(directory).config.model
    rewrite(directory, stored["policy"])
    mean, std = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
    assert sqap.load(directory).config == PolicyConfig(
        family="openvla-oft",
        model=model,
        cameras=("front", "wrist"),
        images=(
            (Stretch(32), Crop(0.9), Scale(), Normalize(mean, std)),
            (Stretch(32), Crop(0.9), Scale(), Normalize()),
        ),
        actions=(
            Clamp(),
            Binarize((3,)),
            Range((-0.5, -0.25, 0.1, 0.0), (0.5, 1.0, 2.3, 1.0), (True, True, True, False)),
        ),
        prompt=PromptConfig((Lower(), Template("In: {instruction}?\nOut:")), append=(5, 2)),
        state=(
            Range((-1.5, -2.0, 0.0, 0.25, -1.0), (1.0, 2.0, 0.0, 0.75, 1.0), (True,) * 4 + (False,)),
            Clamp(),
        ),
        units=ActionUnits((0, 1, 2), 10.0, 3, 0.5),
    )


def test_it_computes_what_it_computed_to_the_bit(directory, stored):
    rewrite(directory, stored["policy"])
    policy, expected = sqap.load(directory), stored["expected"]
    rng = np.random.default_rng(7)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    state = rng.standard_normal(5)
    state[2] = 5e-9
    actions = (1.3 * rng.standard_normal((6, 4))).astype(np.float32)
    inputs = policy.inputs(Observation({"front": image, "wrist": image}, "OPEN the drawer", state), None)
    for pixels, sha256 in zip(inputs.pixels, expected["pixels"], strict=True):
        assert pixels.shape == (2, 3, 32, 32)
        for one in pixels:
            assert hashlib.sha256(one.contiguous().numpy().tobytes()).hexdigest() == sha256
    assert inputs.token_ids.tolist() == [expected["ids"]]
    assert inputs.proprio.tolist() == [expected["proprio"]]
    assert unnormalize(actions, policy.config.actions).tolist() == expected["chunk"]


def test_settings_that_were_left_out_are_version_3s(directory, stored):
    policy = stored["policy"]
    for name in ("prompt", "append_tokens", "crop", "units"):
        del policy[name]
    for name in ("binarize", "clip"):
        del policy["actions"][name]
    del policy["model"]["vision"][0]["mean"]
    rewrite(directory, policy)
    config = sqap.load(directory).config
    assert config.images[0][2] == Normalize(std=(0.228515625, 0.2236328125, 0.224609375))
    assert [len(steps) for steps in config.images] == [3, 3]
    assert config.prompt == PromptConfig((Lower(), Template("{instruction}")))
    assert [type(step) for step in config.actions] == [Clamp, Range]
    assert config.units is None


def test_actions_that_were_not_cut_are_not(directory, stored):
    stored["policy"]["actions"] |= {"clip": False, "binarize": []}
    rewrite(directory, stored["policy"])
    assert [type(step) for step in sqap.load(directory).config.actions] == [Range]


def test_what_is_saved_again_is_of_the_version_of_today(directory, stored, tmp_path):
    rewrite(directory, stored["policy"])
    old = sqap.load(directory)
    old.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "policy.json").read_text())["version"] == 4
    assert sqap.load(tmp_path / "again").config == old.config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"crop": 0.0}, r"policy: the area must be in \(0, 1\], got 0.0"),
        ({"crop": "half"}, "policy.crop must be float, got 'half'"),
        ({"prompt": "do it"}, r"policy: a template must have \{instruction\} in it"),
        ({"actions": {"low": [0.0], "high": [1.0], "mask": [True]}}, "statistics are of 1 dimensions, for 4"),
        ({"actions": {"low": [0.0], "high": [1.0], "mask": []}}, "policy: low, high and mask must have one"),
        ({"actions": None}, "policy.actions must be an object, got NoneType"),
        ({"proprio": {"low": [0.0], "high": [1.0], "mask": [True]}}, "state makes 1 numbers, but model.prop"),
        ({"proprio": None}, "state and model.proprio_dim must both be given or both be null"),
        ({"images": []}, "policy has no setting 'images'"),
        ({"model": None}, "policy.model must be an object, got NoneType"),
        ({"model": {"vision": [3]}}, "policy.model"),
        ({"model": {"vision": 3}}, "policy.model"),
    ],
)
def test_what_no_policy_can_be_is_one_sentence(directory, stored, changes, sentence):
    rewrite(directory, stored["policy"] | changes)
    with pytest.raises(CheckpointError, match=sentence):
        sqap.load(directory)


@pytest.mark.parametrize("change", [None, [], 3])
def test_no_policy_at_all_is_one_sentence(directory, change):
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match="policy must be an object, got"):
        sqap.load(directory)


@pytest.mark.parametrize("name", ["reference", "reference-smollm"])
def test_the_bundled_policies_are_of_either_version(name):
    if not BUNDLED[name].is_dir():
        pytest.skip("only in a checkout")
    config = sqap.load(name).config
    assert config.images == tuple(stretched(vision.image_size) for vision in config.model.vision)
    low, high = config.actions[1].low, config.actions[1].high
    assert config.actions == (Clamp(), Range(low, high, (True,) * 4))
    assert config.prompt == PromptConfig((Lower(), Template("{instruction}")))
    assert (config.state, config.units) == (None, ActionUnits((0, 1, 2), 10.0, 3))


def test_a_crop_of_version_4_is_not_one_of_version_3(directory):
    """A version that is read by mistake as another is refused."""
    policy = sqap.load(directory)
    images = tuple(cropped(steps, 0.5) for steps in policy.config.images)
    dataclasses.replace(policy, config=dataclasses.replace(policy.config, images=images)).save(directory)
    rewrite(directory, json.loads((directory / "policy.json").read_text())["policy"])
    with pytest.raises(CheckpointError, match="policy has no setting 'images'"):
        sqap.load(directory)
