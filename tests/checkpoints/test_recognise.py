"""A directory is recognised by what its files say."""

import json

import pytest
import torch

from sqap.checkpoints.choices import Choices
from sqap.checkpoints.published import recognise
from sqap.errors import CheckpointError


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("openvla", "OpenVLA"),
        ("oft-libero", "OpenVLA-OFT"),
        ("oft-aloha", "OpenVLA-OFT"),
        ("cogact", "CogACT and OpenVLA in Prismatic's own layout"),
        ("native-openvla", "CogACT and OpenVLA in Prismatic's own layout"),
        ("smolvla", "SmolVLA"),
        ("pi0", "pi0 and pi0.5"),
        ("pi05", "pi0 and pi0.5"),
    ],
)
def test_published_directories_are_recognised_and_opened(written, family, name):
    found = recognise(written(family))
    assert found.name == name
    key = "bridge_orig" if "openvla" in family or family == "cogact" else None
    published = found.open(written(family), Choices(unnorm_key=key))
    expected = {"native": "openvla", "oft": "openvla-oft"}.get(family.partition("-")[0], family)
    assert published.config.family == expected


@pytest.mark.parametrize(
    "part", ["action_head", "proprio_projector", "vision_backbone", "noisy_action_projector"]
)
def test_any_part_that_was_tuned_beside_it_makes_it_openvla_oft(publish, part):
    directory = publish("openvla")
    torch.save({"w": torch.zeros(1)}, directory / f"{part}--latest_checkpoint.pt")
    assert recognise(directory).name == "OpenVLA-OFT"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("groot", "GR00T"), ("xvla", "X-VLA"), ("pi0_fast", "pi0-FAST"), ("pi0fast", "pi0-FAST")],
)
def test_lerobots_policies_are_known_by_name(tmp_path, kind, name):
    (tmp_path / "config.json").write_text(json.dumps({"type": kind, "n_obs_steps": 1}))
    with pytest.raises(
        CheckpointError, match=f"LeRobot's {name} is not supported; known are OpenVLA; .*; SmolVLA"
    ):
        recognise(tmp_path)


def test_openpis_jax_checkpoints_are_told_where_they_are_for_pytorch(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "_METADATA").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"openpi's JAX checkpoints, which LeRobot has .*lerobot/pi0_base"
    ):
        recognise(tmp_path)


def test_openpis_conversions_are_told_apart_from_lerobots(tmp_path):
    config = {
        "action_dim": 32,
        "action_horizon": 50,
        "paligemma_variant": "gemma_2b",
        "precision": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert recognise(tmp_path).name == "pi0 and pi0.5 of openpi, converted to PyTorch"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "llava"}, "its config.json has the model_type 'llava'"),
        ({"type": "act"}, "its config.json has the type 'act'"),
        ({"vla": {"type": "x"}}, "has neither a model_type nor a base VLM"),
        ({"vla": "x"}, "has neither a model_type nor a base VLM"),
    ],
)
def test_other_families_are_told_what_was_found_and_what_is_known(tmp_path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        recognise(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is of no family that sqap knows: "
        + (found if found.startswith("its") else f"its config.json {found}")
        + "; known are OpenVLA; OpenVLA-OFT; CogACT and OpenVLA in Prismatic's own layout; SmolVLA; "
        "pi0 and pi0.5; pi0 and pi0.5 of openpi, converted to PyTorch"
    )


def test_a_directory_without_a_configuration_is_told_what_is_in_it(tmp_path):
    with pytest.raises(CheckpointError, match="knows: it is empty; known are"):
        recognise(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"it has no config\.json, but thesis\.tex; known are"):
        recognise(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[]", r"config\.json must hold an object")]
)
def test_a_configuration_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        recognise(tmp_path)
