"""``policy.json`` is not believed because its hashes are right: what no policy can be is one sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sqap
from sqap.checkpoints import native
from sqap.config import Calibration
from sqap.errors import CheckpointError
from sqap.processing import ActionUnits, Binarize, PromptConfig, Range, Template, cropped, stretched


def put(data: Any, path: str, value: Any) -> None:
    """Set what ``path`` names, as "policy.model.vision.0.width"."""
    *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in above:
        data = data[part]
    data[last] = value


IMAGES, CROP, ACTIONS, PROMPT = (
    "policy.images.0",
    "policy.images.0.1",
    "policy.actions",
    "policy.prompt.steps.0",
)
RANGE = {"kind": "range", "low": [0.0], "high": [1.0], "mask": [True]}
VISION, DECODER, HEAD = "policy.model.vision.0", "policy.model.decoder", "policy.model.head"
WRONG = [
    (f"{CROP}.area", 0.0, r"policy.images\[0\]\[1\]: the area must be in \(0, 1\], got 0.0"),
    (f"{CROP}.area", 1.5, "the area must be in"),
    (f"{CROP}.area", float("nan"), r"policy.images\[0\]\[1\].area must be a finite number, got nan"),
    (f"{CROP}.area", 10**400, r"images\[0\]\[1\].area must be a finite number"),
    (f"{CROP}.kind", "zoom", r"images\[0\]\[1\].kind must be one of 'stretch', 'crop', 'scale', "),
    ("policy.images", [], "policy.images must be 1 lists, one for each encoder, got 0"),
    (f"{IMAGES}.0.size", 31, r"images\[0\] must resize to 32, the image_size of the vision encoder"),
    (f"{IMAGES}.0.size", 0, r"images\[0\]\[0\]: the size must be at least 1, got 0"),
    (IMAGES, [{"kind": "scale"}], r"images\[0\] must resize to 32"),
    (IMAGES, [{"kind": "stretch", "size": 32}], r"images\[0\] must make floats of bytes, by 'scale'"),
    (f"{IMAGES}.2.kind", "normalize", r"images\[0\]\[2\]: 'normalize' reads floats, and what is before it "),
    (f"{IMAGES}.3.std", [0.5, 0.0, 0.5], r"images\[0\]\[3\]: std must be positive"),
    ("policy.cameras", [], "policy.cameras must be 1 different names, got none"),
    ("policy.cameras", ["a", "b"], "policy.cameras must be 1 different names, got a, b"),
    (
        f"{ACTIONS}.2.low",
        [0.0] * 3,
        r"actions\[2\]: low, high and mask must have one length, got 3, 4 and 4",
    ),
    (f"{ACTIONS}.2.mask", [], "low, high and mask must have one length, got 4, 4 and 0"),
    (f"{ACTIONS}.2", RANGE, r"policy.actions\[2\]: its statistics are of 1 dimensions, for 4"),
    (f"{ACTIONS}.2.epsilon", -1e-8, "epsilon must not be negative, got -1e-08"),
    (
        f"{ACTIONS}.2.high",
        [1.0, 1.0, 1.0, float("inf")],
        r"actions\[2\].high\[3\] must be a finite number, got inf",
    ),
    (f"{ACTIONS}.1.dimensions", [4], r"actions\[1\]: dimensions must be below 4, got \[4\]"),
    (f"{ACTIONS}.1.dimensions", [-1], r"actions\[1\]: dimensions must be different ones from 0 on"),
    (f"{ACTIONS}.1.dimensions", [3, 3], "dimensions must be different ones from 0 on"),
    (f"{ACTIONS}.0", {"kind": "take", "width": 5}, "5 dimensions cannot be taken of 4"),
    (f"{ACTIONS}.0", {"kind": "take", "width": 0}, "the width must be at least 1, got 0"),
    (f"{ACTIONS}.0", {"kind": "take", "width": 3}, r"actions\[1\]: dimensions must be below 3, got \[3\]"),
    (f"{ACTIONS}.0", {"kind": "add_state", "dimensions": [4]}, "dimensions must be below 4"),
    ("policy.state", [RANGE], "must both be given or both be null"),
    (
        f"{PROMPT}.text",
        "{instruction} {state}",
        "policy.prompt must tell the {state} where model.state_in is",
    ),
    ("policy.model.state_in", "text", "policy.prompt must tell the {state} where model.state_in is 'text'"),
    ("policy.n_action_steps", 0, "policy.n_action_steps must be from 1 to .*, or null, got 0"),
    ("policy.n_action_steps", 99, "the actions of a chunk, or null, got 99"),
    (f"{PROMPT}.text", "do it", "template must have {instruction} in it"),
    (f"{PROMPT}.text", "{instruction} {robot}", "template must have {instruction} in it"),
    (f"{PROMPT}.text", "{instruction.__class__}", "template must have {instruction} in it"),
    (f"{PROMPT}.text", "{instruction", r"prompt.steps\[0\]: .* is not a template"),
    ("policy.prompt.longest", 0, "longest must be at least 1 or null, got 0"),
    ("policy.prompt.append", [8], "prompt.append must be from 0 to 7, got 8"),
    ("policy.prompt.append", [-1], "prompt.append must be from 0 to 7, got -1"),
    ("policy.units.translation", [0, 1, 9], "units.translation must be different dimensions"),
    ("policy.units.gripper", 4, "units.gripper must be different dimensions"),
    ("policy.units.millimetres", -1.0, "units.millimetres must be positive"),
    ("policy.model.vision", [], "policy.model: vision must name at least one encoder"),
    ("policy.model.cameras", 0, "model.cameras must be at least 1, got 0"),
    ("policy.model.projector", [], "model.projector must not be empty"),
    ("policy.model.projector", [32, 0], "model.projector must be at least 1, got 0"),
    (f"{VISION}.depth", -1, "model.vision.depth must be at least 1, got -1"),
    (f"{VISION}.patch_size", 0, r"policy.model.vision\[0\]: patch_size must be at least 1, got 0"),
    (f"{VISION}.patch_size", 7, "patches of 7 do not cut an image of 32 evenly"),
    (f"{VISION}.heads", 3, "3 heads do not share a width of 16 evenly"),
    (f"{VISION}.take_block", 1, "take_block must name one of 1 blocks, got 1"),
    (f"{DECODER}.kv_heads", 0, "decoder.kv_heads must be at least 1"),
    (f"{DECODER}.kv_heads", 3, "2 heads do not share 3 keys evenly"),
    (f"{DECODER}.head_dim", 15, "head_dim must be even, got 15"),
    (f"{DECODER}.rope_theta", 0, "rope_theta must be positive"),
    (f"{HEAD}.heads", 3, "3 heads do not share a width of 16 evenly"),
    ("calibration", False, "calibration must be an object, got bool"),
    ("calibration.frames", 0, "calibration.frames must be at least 1, got 0"),
    ("calibration.top_k", 17, "calibration.top_k must be from 0 to 6, got 17"),
    ("calibration.overlap", 2.0, r"calibration.overlap must be in \[0, 1\], got 2.0"),
    ("source", 3, "source must be a hash or null"),
    ("sha256", {"model.safetensors": ""}, "sha256 must be of model.safetensors and tokenizer.json"),
    ("sha256.../../secret", "", "sha256 must be of model.safetensors and tokenizer.json"),
]


@pytest.fixture
def compressed(policy, observe, tmp_path) -> Path:
    """A compressed policy with units and a calibration."""
    clip, bounds = policy.config.actions
    changes = {
        "units": ActionUnits((0, 1, 2), 10.0, 3),
        "images": (cropped(stretched(32), 0.9),),
        "actions": (clip, Binarize((3,)), bounds),
        "prompt": PromptConfig((Template("{instruction}"),)),
    }
    policy.config = dataclasses.replace(policy.config, **changes)
    sqap.compress(policy, sqap.Recipe.w4a8(), [observe()]).save(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize(("path", "value", "sentence"), WRONG)
def test_what_no_policy_can_be_is_one_sentence(compressed, path, value, sentence):
    manifest = json.loads((compressed / "policy.json").read_text())
    if path.startswith("sha256..."):
        manifest["sha256"][path.removeprefix("sha256.")] = value
    else:
        put(manifest, path, value)
    (compressed / "policy.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=sentence.replace("{", r"\{").replace("}", r"\}")) as error:
        sqap.load(compressed)
    assert str(compressed) in str(error.value)


def rehash(directory: Path, name: str) -> None:
    """What an attacker does, too."""
    manifest = json.loads((directory / "policy.json").read_text())
    manifest["sha256"][name] = native._sha256(directory / name)
    (directory / "policy.json").write_text(json.dumps(manifest))


def test_weights_of_another_type_are_refused(compressed):
    weights = compressed / "model.safetensors"
    tensors = load_file(weights)
    name = "decoder.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].float()}, weights)
    rehash(compressed, "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is float32 .*, not uint8"):
        sqap.load(compressed)
    norm = "decoder.norm.weight"
    for dtype in (torch.int32, torch.float8_e4m3fn):
        save_file(tensors | {norm: tensors[norm].to(dtype)}, weights)
        rehash(compressed, "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{norm} is {str(dtype).removeprefix('torch.')}"):
            sqap.load(compressed)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: "{}", "is not a tokenizer"),
        (lambda text: text.replace('"drawer": 6', '"drawer": 8'), "token 8, but the model embeds up to 7"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(compressed, change, sentence):
    path = compressed / "tokenizer.json"
    path.write_text(change(json.dumps(json.loads(path.read_text()))))
    rehash(compressed, "tokenizer.json")
    with pytest.raises(CheckpointError, match=sentence):
        sqap.load(compressed)


def test_a_policy_that_could_not_be_loaded_is_not_saved(policy, tmp_path):
    policy.config = dataclasses.replace(policy.config, state=(Range((0.0,), (1.0,), (True,)),))
    with pytest.raises(CheckpointError, match="must both be given or both be null"):
        policy.save(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_a_calibration_of_one_token_and_all_of_them_is_believed(compressed):
    for top_k in (0, 6):
        manifest = json.loads((compressed / "policy.json").read_text())
        manifest["calibration"]["top_k"] = top_k
        (compressed / "policy.json").write_text(json.dumps(manifest))
        expected = {**manifest["calibration"], "layers": tuple(manifest["calibration"]["layers"])}
        assert sqap.load(compressed).calibration == Calibration(**expected)
