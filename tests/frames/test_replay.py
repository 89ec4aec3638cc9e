"""Recorded episodes, replayed through policies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frame_samples import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import sqap
from sqap import Recipe
from sqap.cli import app
from sqap.frames import read_dataset
from sqap.replay import Comparison, Replayed, relative

pytest.importorskip("pyarrow")

CAMERA = "corner2"  # of the policy in small
LENGTHS, EVERY = (5, 8, 3), 3
JOINTS = ["pan", "lift", "elbow", "gripper"]
OFFSET = 0.25  # of what was recorded from what the policy does, in the joint "elbow"


@pytest.fixture
def saved(policy, tmp_path) -> Path:
    policy.config = dataclasses.replace(policy.config, n_action_steps=EVERY)
    policy.save(tmp_path / "policy")
    return tmp_path / "policy"


def write(root: Path, policy: Any, **options: Any) -> Path:
    """A dataset of what a policy does at every third frame and thereafter, but for `OFFSET`."""
    cameras = {f"observation.images.{CAMERA}": "image"}
    seen = read_dataset(write_dataset(root / "seen", cameras, LENGTHS), [CAMERA], sum(LENGTHS))
    actions: list[list[float]] = []
    for length in LENGTHS:
        first = len(actions)
        for look in range(0, length, EVERY):
            chunk = policy.act(seen[first + look], seed=first + look)
            actions += chunk[: min(EVERY, length - look)].tolist()
    for action in actions:
        action[2] -= OFFSET
    options = {"action_names": JOINTS, **options}
    return write_dataset(root / "data", cameras, LENGTHS, action=lambda i: actions[i], **options)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["replay", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_errors_against_recorded_actions_and_against_the_original(saved, tmp_path):
    original = sqap.load(saved)
    small = sqap.compress(original, Recipe.w4a4(1), read_dataset(write(tmp_path, original), [CAMERA], 2))
    small.save(tmp_path / "small")
    numbers, plots = tmp_path / "replay.json", tmp_path / "plots"
    small_dir = tmp_path / "small"
    out = run(small_dir, tmp_path / "data", "--against", saved, "--plot", plots, "--card", "--json", numbers)
    assert "Episodes 0, 1, 2: 16 recorded actions, 3 of each chunk" in out
    found = json.loads(numbers.read_text())
    assert found["names"] == JOINTS
    assert [(e["episode"], e["frames"], e["steps"]) for e in found["episodes"]] == [
        (0, 5, 2), (1, 8, 3), (2, 3, 1)
    ]  # fmt: skip
    # The original did what was recorded, with the same noise, but for the elbow.
    exact, compressed, between = (found["errors"][name] for name in ("policy", "small", "difference"))
    for kind in ("mean", "rms", "largest"):
        np.testing.assert_allclose(exact[kind], [0, 0, OFFSET, 0], atol=1e-6)
    assert 0 < max(between["largest"]) < 1
    assert compressed["mean"][0] == pytest.approx(between["mean"][0], abs=1e-6)
    card = (small_dir / "README.md").read_text()
    assert "Recorded actions of `data`, beside `policy`" in card
    assert f"| `elbow` | {found['spread'][2]:.4g} | " in card
    with Image.open(plots / "episode-1.png") as picture:
        assert picture.format == "PNG"
    assert sorted(path.name for path in plots.iterdir()) == [f"episode-{i}.png" for i in range(3)]


def test_episodes_by_number(saved, tmp_path):
    data, numbers = write(tmp_path, sqap.load(saved), action_names={"motors": JOINTS}), tmp_path / "r.json"
    out = run(saved, data, "--episodes", "2,0", "--json", numbers)
    assert "Episodes 2, 0: 8 recorded actions" in out
    found = json.loads(numbers.read_text())
    assert [each["episode"] for each in found["episodes"]] == [2, 0]
    assert found["names"] == JOINTS
    assert found["against"] is None


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["--episodes", "0,7"], {}, "has no episode 7; it has 3, numbered from 0 to 2"),
        (["--episodes", "0-2"], {}, "--episodes 0-2 must be numbers from 0 on, separated by commas"),
        (["--action", "actions"], {}, "no actions 'actions'; --action names their key, and the dataset's "
         "columns of numbers are observation.state, action"),
        (["--camera", "corner2=wrist"], {}, "has no camera 'wrist' to use as the policy's 'corner2'"),
        (["--card"], {}, "--card writes down a comparison; give --against, too"),
        (["--state", "joints"], {}, "has no state 'joints'"),
        (["--action", "observation.state"], {}, "observation.state has 2 numbers (x, y), and the policy's "
         "actions have 4"),
        ([], {"info": {"codebase_version": "v2.1"}}, "LeRobotDataset v2.1, and v3.0 is read here"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(options, changes, message, saved, tmp_path):
    cameras = {f"observation.images.{CAMERA}": "image"}
    data = write_dataset(tmp_path / "data", cameras, LENGTHS, action=lambda i: [0.0] * 4, **changes)
    out = run(saved, data, *options, code=1)
    assert message in out
    assert "Traceback" not in out


def test_what_is_no_dataset_and_actions_that_are_none(saved, tmp_path):
    assert "is no LeRobotDataset: it has no meta/info.json" in run(saved, tmp_path / "none", code=1)
    cameras = {f"observation.images.{CAMERA}": "image"}
    broken = write_dataset(
        tmp_path / "broken", cameras, LENGTHS, action=lambda i: [0, 0, 0, np.nan if i == 6 else 1]
    )
    out = run(saved, broken, "--episodes", 1, code=1)
    assert "frame 1 of episode 1: action must be 4 finite numbers, got [0.0, 0.0, 0.0, nan]" in out


def test_policies_of_two_robots_are_not_compared(saved, policy, tmp_path):
    other = dataclasses.replace(policy.config, actions=(sqap.processing.actions.Take(3),))
    policy.config = other
    policy.save(tmp_path / "other")
    out = run(saved, tmp_path / "none", "--against", tmp_path / "other", code=1)
    assert "compare policies of one robot" in out


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), frames=st.integers(1, 20), shift=st.floats(-3, 3))
def test_deviation_of_shifted_actions_is_the_shift(seed, frames, shift):
    recorded = [np.random.default_rng(seed + i).standard_normal((frames, 3)) for i in range(2)]
    recorded = [actions * [1, 1, 0] + [0, 0, 0.1] for actions in recorded]
    acted = [Replayed(i, (0,), actions, actions + shift) for i, actions in enumerate(recorded)]
    compared = Comparison.of({"policy": acted}, ("pan", "lift", "elbow"))
    error, spread = compared.errors["policy"], np.array(compared.spread)
    for values in (error.mean, error.rms, error.largest):
        np.testing.assert_allclose(values, abs(shift), atol=1e-12)
    expected = np.sqrt(np.mean((shift / spread[:2]) ** 2))  # the third joint does not move
    assert relative(error, spread) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert relative(error, [0.0, 0.0, 0.0]) is None
