"""pi0 and pi0.5 as openpi's own converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import published_lerobot
import pytest

import sqap
from sqap import Observation
from sqap.errors import CheckpointError
from sqap.processing import EndWith, Spaces
from tests.checkpoints.lerobot_directories import edit

KINDS = ("pi0", "pi05")
CAMERAS = ("top", "wrist")


@pytest.fixture
def directory(tmp_path) -> Path:
    published_lerobot.write_openpi(tmp_path / "openpi")
    return tmp_path / "openpi"


def seen(instruction: str = "Open the Drawer") -> Observation:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for name in CAMERAS}
    return Observation(images, instruction, rng.standard_normal(6))


@pytest.mark.parametrize("kind", KINDS)
def test_it_acts_as_lerobots_conversion_of_the_same_weights(kind, tmp_path):
    """`tests/parity` compares that one with LeRobot. openpi adds 1e-6 where LeRobot adds 1e-8."""
    published_lerobot.write_openpi(tmp_path / "openpi", kind=kind)
    published_lerobot.write_pi(tmp_path / "lerobot", kind=kind)
    found = sqap.load(tmp_path / "openpi", cameras=CAMERAS)
    expected = sqap.load(tmp_path / "lerobot")
    assert found.config.model == expected.config.model
    assert found.config.family == expected.config.family
    np.testing.assert_allclose(found.act(seen(), seed=3), expected.act(seen(), seed=3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_openpis_formulas(kind, tmp_path):
    """z-scores for pi0, quantiles for pi0.5, with 1e-6 in both directions, and spaces for underscores."""
    published_lerobot.write_openpi(tmp_path / "openpi", kind=kind)
    config = sqap.load(tmp_path / "openpi", cameras=CAMERAS).config
    file = tmp_path / "openpi" / "assets" / "trossen" / "norm_stats.json"
    stats = json.loads(file.read_text())["norm_stats"]
    mean, std, low, high = (
        {k: np.array(v[n]) for k, v in stats.items()} for n in ("mean", "std", "q01", "q99")
    )
    x, y = np.linspace(-2, 2, 6), np.linspace(-1.5, 1.5, 7)[None]
    if kind == "pi0":
        state = (x - mean["state"]) / (std["state"] + 1e-6)
        actions = y * (std["actions"] + 1e-6) + mean["actions"]
        assert config.prompt.steps == (Spaces(), EndWith("\n"))
    else:
        state = (x - low["state"]) / (high["state"] - low["state"] + 1e-6) * 2 - 1
        actions = (y + 1) / 2 * (high["actions"] - low["actions"] + 1e-6) + low["actions"]
    np.testing.assert_allclose(config.state[0].normalize(x), state, rtol=1e-12)
    np.testing.assert_allclose(config.actions[-1].unnormalize(y), actions, rtol=1e-12)


def test_what_no_file_says_is_asked_for(directory):
    with pytest.raises(
        CheckpointError, match=r"does not name the policy's cameras: .*--cameras base,left_wrist"
    ):
        sqap.load(directory)
    with pytest.raises(CheckpointError, match="got top, top"):
        sqap.load(directory, cameras=("top", "top"))
    (directory / "assets" / "trossen" / "norm_stats.json").unlink()
    with pytest.raises(CheckpointError, match=r"assets has no norm_stats.json, .*--unnorm-key none"):
        sqap.load(directory, cameras=CAMERAS)
    config = sqap.load(directory, cameras=CAMERAS, unnorm_key="none").config
    assert (config.action_dim, config.state_dim) == (32, 32)


def test_several_data_sets_are_chosen_from(tmp_path):
    published_lerobot.write_openpi(tmp_path / "two", assets=("trossen", "physical-intelligence/libero"))
    with pytest.raises(CheckpointError, match=r"several datasets; .*: physical-intelligence/libero, trossen"):
        sqap.load(tmp_path / "two", cameras=CAMERAS)
    with pytest.raises(CheckpointError, match="no statistics of 'droid'"):
        sqap.load(tmp_path / "two", cameras=CAMERAS, unnorm_key="droid")
    key = "physical-intelligence/libero"
    assert sqap.load(tmp_path / "two", cameras=CAMERAS, unnorm_key=key).config.action_dim == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, "has no statistics of 'state'"),
        ({"actions": {"std": [1.0]}}, "actions has no mean"),
        ({"actions": {"mean": "0"}}, "actions.mean must be a list of numbers"),
        (
            {"actions": {"mean": [0.0] * 40}},
            "actions has 40 numbers, and the model's have 32",
        ),
        ({"actions": {"mean": [0.0] * 7, "std": None}}, "action lacks std"),
    ],
)
def test_statistics_that_do_not_fit(change, message, directory):
    file = directory / "assets" / "trossen" / "norm_stats.json"
    file.write_text(json.dumps({"norm_stats": json.loads(file.read_text())["norm_stats"] | change}))
    with pytest.raises(CheckpointError, match=message):
        sqap.load(directory, cameras=CAMERAS)


def test_a_configuration_that_does_not_fit_is_refused(directory):
    edit(directory, action_dim=16)
    with pytest.raises(CheckpointError, match="action"):
        sqap.load(directory, cameras=CAMERAS)
