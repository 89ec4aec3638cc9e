"""One door for the three sources."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from frame_samples import draw, write_dataset
from PIL import Image

import sqap
import sqap.frames
from sqap import Observation, Recipe
from sqap.errors import InputError
from sqap.frames import read_frames
from sqap.observation import hash_frames
from sqap.processing import Range

CAMERA = "corner2"  # of the policy in small


@pytest.fixture
def images(tmp_path):
    """A directory of four images."""
    root = tmp_path / "images"
    root.mkdir()
    lines = []
    for i in range(4):
        Image.fromarray(draw(i)).save(root / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "instruction": "open the drawer"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture
def dataset(tmp_path):
    """A LeRobotDataset of 16 frames."""
    return write_dataset(tmp_path / "dataset", {f"observation.images.{CAMERA}": "image"})


@contextmanager
def closed(directory: Path) -> Iterator[None]:
    """Nobody may look into ``directory``, though everybody into those above it; root is somebody else."""
    changed = [parent for parent in directory.parents if not parent.stat().st_mode & 0o001]
    modes = [(path, path.stat().st_mode) for path in (directory, *changed)]
    for parent in changed:
        parent.chmod(0o755)
    directory.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes:
            path.chmod(mode)


@pytest.mark.parametrize("source", ["images", "dataset"])
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_directory_is_read_by_what_is_in_it(source, kind, policy, request):
    pytest.importorskip("pyarrow")
    root = kind(request.getfixturevalue(source))
    frames = read_frames(root, policy, 3)
    assert len(frames) == 3
    assert list(frames[0].images) == [CAMERA]
    assert hash_frames(frames) == hash_frames(read_frames(root, policy, 3))
    policy.act(frames[0], seed=0)


def test_a_simulator_is_read_by_its_name_even_where_a_directory_has_it(policy, images, monkeypatch, observe):
    monkeypatch.chdir(images)
    (images / "metaworld").mkdir()
    frame = observe()
    monkeypatch.setattr(
        sqap.frames, "collect_frames", lambda *args: [frame] if args[:2] == (policy, "metaworld") else []
    )
    assert read_frames("metaworld", policy, 2) == [frame]
    with pytest.raises(
        InputError, match=r"^metaworld has no meta/info\.json|^metaworld is no LeRobotDataset"
    ):
        read_frames("./metaworld", policy, 2)


def test_a_camera_of_the_dataset_can_stand_in_for_the_policys(policy, tmp_path):
    pytest.importorskip("pyarrow")
    root = write_dataset(tmp_path, {"observation.images.top": "image"})
    with pytest.raises(InputError, match="no camera 'corner2', which the policy reads"):
        read_frames(root, policy, 1)
    assert list(read_frames(root, policy, 1, cameras={CAMERA: "top"})[0].images) == [CAMERA]


def test_what_compress_learned_carries_the_hash_of_its_frames(policy, images):
    frames = read_frames(images, policy, 2)
    small = sqap.compress(policy, Recipe.w4a8(), frames)
    assert small.calibration is not None
    assert small.calibration.frames == 2
    assert small.calibration.frames_hash == hash_frames(frames)


@pytest.mark.parametrize("count", [0, -3])
def test_no_frames_are_not_enough(count, policy, images):
    with pytest.raises(InputError, match=f"at least one calibration frame is needed, got a count of {count}"):
        read_frames(images, policy, count)


def test_a_source_that_is_none_is_refused(policy, images):
    for source in ("no/such/place", images / "0.png"):
        with pytest.raises(
            InputError, match=f"no calibration frames at {source}: give a directory of images"
        ):
            read_frames(source, policy, 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("metaworld", "metaworld gives the policy's own cameras and state"),
        (None, r"has no meta/info\.json; only the cam"),
    ],
)
@pytest.mark.parametrize("mapped", [{"cameras": {CAMERA: "top"}}, {"state": "joints"}])
def test_only_a_datasets_cameras_and_state_are_mapped(source, mapped, message, policy, images):
    with pytest.raises(InputError, match=message):
        read_frames(source or images, policy, 1, **mapped)


def test_a_policy_that_reads_the_state_is_told_where_a_dataset_has_none(policy, tmp_path):
    pytest.importorskip("pyarrow")
    root = write_dataset(tmp_path, {f"observation.images.{CAMERA}": "image"}, state_key="joints")
    assert read_frames(root, policy, 1)[0].state is None
    state = (Range(low=(0.0, 0.0), high=(9.0, 1.0), mask=(True, True)),)
    policy.config = dataclasses.replace(policy.config, state=state)
    with pytest.raises(InputError, match=r"no state 'observation\.state', which the policy reads; .* joints"):
        read_frames(root, policy, 1)
    assert read_frames(root, policy, 1, state="joints")[0].state[1] == 0.5


def test_a_path_is_no_simulator(policy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no calibration frames at metaworld"):
        read_frames(Path("metaworld"), policy, 1)


@pytest.mark.parametrize("place", [".", "meta/episodes", "meta/episodes/chunk-000"])
def test_a_directory_that_may_not_be_read_is_named(place, policy, dataset):
    """It is neither called missing nor empty."""
    pytest.importorskip("pyarrow")
    with closed(dataset / place), pytest.raises(InputError, match=r"cannot read .*: Permission denied$"):
        read_frames(dataset, policy, 1)


def test_a_name_that_no_directory_can_have_is_refused(policy):
    with pytest.raises(InputError, match=r"cannot read x+: File name too long"):
        read_frames("x" * 300, policy, 1)


@pytest.mark.parametrize("module", ["pyarrow", "av"])
def test_without_the_extra_one_sentence_names_it(module, policy, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    root = write_dataset(tmp_path, {f"observation.images.{CAMERA}": "video"})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r'pyarrow and av \(.*\); pip install "sqap\[lerobot\]"'):
        read_frames(root, policy, 1)


def test_the_hash_knows_pixels_instruction_and_state():
    def digest(pixel: int = 0, instruction: str = "go", state: list[float] | None = None) -> str:
        image = np.full((2, 2, 3), pixel, np.uint8)
        return hash_frames([Observation({"front": image}, instruction, state)])

    variants = [
        digest(),
        digest(pixel=1),
        digest(instruction="stop"),
        digest(state=[0.0]),
        digest(state=[1.0]),
        digest(state=[0.0, 0.0]),
    ]
    assert len(set(variants)) == len(variants)
    assert digest(state=[1.0]) == digest(state=[1.0])
