"""LeRobot's files beside an artefact: type, features and steps. Nothing of ours depends on them."""

import dataclasses
import json

import numpy as np
import pytest

import sqap
from sqap.checkpoints import native
from sqap.checkpoints.lerobot.export import describe
from sqap.errors import CheckpointError

BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"


def read(directory, name):
    return json.loads((directory / name).read_text())


def test_a_compressed_smolvla_keeps_the_names_of_the_originals_features(written, tmp_path):
    original = read(written("smolvla"), "config.json")
    sqap.load(written("smolvla")).save(tmp_path / "own")
    config = read(tmp_path / "own", "config.json")
    assert list(config["input_features"]) == list(original["input_features"])
    assert {name: feature["type"] for name, feature in config["input_features"].items()} == {
        "observation.images.top": "VISUAL",
        "observation.images.wrist": "VISUAL",
        "observation.state": "STATE",
    }
    assert config["input_features"]["observation.state"] == original["input_features"]["observation.state"]
    assert config["output_features"] == original["output_features"]
    assert config["n_action_steps"] == original["n_action_steps"]
    assert (config["type"], config["device"]) == ("sqap", "cpu")


@pytest.mark.parametrize(
    ("family", "key", "cameras", "state", "actions", "executed"),
    [
        ("cogact", "bridge_orig", ["image"], None, 7, 16),
        ("openvla", "bridge_orig", ["image"], None, 7, 1),
        ("oft-libero", None, ["image", "wrist_image"], 8, 7, 8),
    ],
)
def test_every_family_tells_lerobot_what_it_reads_and_gives(
    written, tmp_path, family, key, cameras, state, actions, executed
):
    sqap.load(written(family), unnorm_key=key).save(tmp_path / "own")
    config = read(tmp_path / "own", "config.json")
    names = [f"observation.images.{camera}" for camera in cameras]
    assert list(config["input_features"]) == names + ["observation.state"] * (state is not None)
    if state is not None:
        assert config["input_features"]["observation.state"]["shape"] == [state]
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [actions]}}
    assert config["n_action_steps"] == executed


def test_images_that_lerobot_calls_something_else_keep_their_name(policy):
    config = dataclasses.replace(policy.config, cameras=("observation.image",))
    assert list(describe(config)["input_features"]) == ["observation.image"]


def test_what_lerobots_tools_override_is_there_and_nothing_normalises(saved):
    before, after = read(saved, BEFORE), read(saved, AFTER)
    assert [step["registry_name"] for step in before["steps"]] == [
        "rename_observations_processor",
        "to_batch_processor",
        "device_processor",
    ]
    assert before["steps"][0]["config"] == {"rename_map": {}}
    assert [step["registry_name"] for step in after["steps"]] == ["device_processor"]


@pytest.mark.parametrize("name", ["config.json", BEFORE, AFTER, "README.md"])
@pytest.mark.parametrize("change", ["missing", "nonsense", "a directory"])
def test_the_policy_and_its_fingerprint_do_not_depend_on_them(saved, observe, name, change):
    mark, before = native.fingerprint(saved), sqap.load(saved).act(observe(), seed=0)
    (saved / name).unlink()
    if change == "nonsense":
        (saved / name).write_bytes(b"\xff{")
    elif change == "a directory":
        (saved / name).mkdir()
    assert native.fingerprint(saved) == mark
    assert np.array_equal(sqap.load(saved).act(observe(), seed=0), before)


def test_an_artefact_from_before_there_were_such_files_is_replaced(policy, saved):
    for name in ("config.json", BEFORE, AFTER, "README.md"):
        (saved / name).unlink()
    policy.save(saved)
    assert read(saved, "config.json")["type"] == "sqap"


def test_what_is_not_ours_is_still_never_replaced(policy, saved):
    (saved / "train_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds train_config\.json beside an sqap policy"):
        policy.save(saved)
