"""The door: what an observation must be, and what is said when it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sqap.errors import InputError
from sqap.observation import Camera, Observation


def image(height: int = 4, width: int = 6) -> np.ndarray:
    return np.zeros((height, width, 3), dtype=np.uint8)


def camera() -> Camera:
    return Camera(intrinsics=np.diag([100, 100, 1]), world_to_camera=np.eye(4))


def observe(**changes: Any) -> Observation:
    return Observation(**{"images": {"front": image()}, "instruction": "open the drawer", **changes})


def test_the_least_one_can_give() -> None:
    observation = observe()
    assert observation.state is None
    assert observation.end_effector is None
    assert observation.cameras == {}


def test_everything_given() -> None:
    observation = observe(
        images={"front": image(), "wrist": image(8, 8)},
        state=[1, 2, 3],
        cameras={"wrist": camera()},
        end_effector=(0.1, 0.2, 0.3),
    )
    assert observation.state is not None
    assert observation.end_effector is not None
    assert observation.state.dtype == observation.end_effector.dtype == np.float64
    np.testing.assert_array_equal(observation.state, [1, 2, 3])
    np.testing.assert_array_equal(observation.end_effector, [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, "at least one image, got none"),
        ({"images": {"front": image().astype(np.float32)}}, r"image 'front' must be a uint8 .*, got float32"),
        ({"images": {"front": image().astype(np.int64)}}, "got int64"),
        ({"images": {"front": image().tolist()}}, r"shape \(H, W, 3\), got list"),
        ({"images": {"front": None}}, "got NoneType"),
        ({"images": {"front": image()[..., 0]}}, r"got shape \(4, 6\)"),
        ({"images": {"front": image()[None]}}, r"got shape \(1, 4, 6, 3\)"),
        ({"images": {"front": image().transpose(2, 0, 1)}}, r"got shape \(3, 4, 6\)"),
        ({"images": {"front": np.zeros((4, 6, 4), np.uint8)}}, r"got shape \(4, 6, 4\)"),
        ({"images": {"front": image(0, 6)}}, r"got shape \(0, 6, 3\)"),
        ({"images": {"front": image(), "wrist": image()[0]}}, "image 'wrist'"),
        ({"instruction": ""}, "instruction is empty"),
        ({"instruction": " \n"}, "instruction is empty"),
        ({"instruction": None}, "instruction is empty"),
        ({"state": [0.0, float("nan"), 1.0]}, r"state\[1\] is nan; every entry must be finite"),
        ({"state": [0.0, 0.0, float("-inf")]}, r"state\[2\] is -inf"),
        ({"state": [[1.0, 2.0]]}, r"state must be a vector, got shape \(1, 2\)"),
        ({"state": 1.0}, r"state must be a vector, got shape \(\)"),
        ({"end_effector": [0.0, 0.0]}, r"end_effector must be a vector of 3 numbers, got shape \(2,\)"),
        ({"end_effector": np.eye(3)}, r"end_effector must be a vector of 3 numbers, got shape \(3, 3\)"),
        ({"end_effector": [0.0, 0.0, float("inf")]}, r"end_effector\[2\] is inf"),
        ({"cameras": {"wrist": camera()}}, r"given for 'wrist', but the images are \['front'\]"),
    ],
)
def test_refusals_name_the_field_and_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        observe(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("intrinsics", "world_to_camera", "message"),
    [
        (np.eye(4), np.eye(4), r"camera intrinsics must be a finite 3x3 matrix, got shape \(4, 4\)"),
        (np.eye(3), np.eye(4)[:3], r"camera world_to_camera must be a finite 4x4 matrix, got shape \(3, 4\)"),
        (np.diag([np.nan, 1, 1]), np.eye(4), "camera intrinsics must be a finite"),
        (np.eye(3), np.diag([1, 1, 1, np.inf]), "camera world_to_camera must be a finite"),
    ],
)
def test_camera_refuses(intrinsics: np.ndarray, world_to_camera: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Camera(intrinsics, world_to_camera)


def test_camera_takes_nested_lists() -> None:
    given = Camera([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.eye(4).tolist())  # type: ignore[arg-type]
    assert given.intrinsics.dtype == np.float64
    np.testing.assert_array_equal(given.world_to_camera, np.eye(4))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": np.zeros((4, 4, 3), np.uint8)}, "images and cameras must be dictionaries"),
        ({"cameras": {"front": np.eye(4)}}, r"cameras\['front'\] must be a Camera, got ndarray"),
        ({"state": ["one", "two"]}, "state must be an array of numbers"),
        ({"end_effector": [[0.0], [1.0, 2.0]]}, "end_effector must be an array of numbers"),
    ],
)
def test_wrong_types_are_one_sentence(changes: dict[str, object], sentence: str) -> None:
    given = {"images": {"front": np.zeros((4, 4, 3), np.uint8)}, "instruction": "go"} | changes
    with pytest.raises(InputError, match=sentence):
        Observation(**given)


def test_a_buffer_that_is_written_to_again_changes_nothing() -> None:
    image, state, place, matrix = np.zeros((4, 4, 3), np.uint8), np.zeros(3), np.zeros(3), np.eye(3)
    camera = Camera(matrix, np.eye(4))
    seen = Observation({"front": image}, "open the drawer", state, {"front": camera}, place)
    for buffer in (image, state, place, matrix):
        buffer[:] = 7
    assert seen.state is not None
    assert seen.end_effector is not None
    assert not seen.images["front"].any()
    assert not seen.state.any()
    assert not seen.end_effector.any()
    assert np.array_equal(seen.cameras["front"].intrinsics, np.eye(3))
