from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqap.observation import Camera
from sqap.pruning.geometry import project

metres = st.floats(-2, 2)


@given(
    yaw=st.floats(-math.pi, math.pi),
    eye=st.tuples(metres, metres, metres),
    local=st.tuples(metres, metres, st.floats(0.05, 5)),
    focal=st.tuples(st.floats(20, 500), st.floats(20, 500)),
    shape=st.tuples(st.integers(16, 640), st.integers(16, 640)),
)
def test_a_point_made_in_the_cameras_frame_lands_where_the_pinhole_says(
    yaw: float,
    eye: tuple[float, float, float],
    local: tuple[float, float, float],
    focal: tuple[float, float],
    shape: tuple[int, int],
) -> None:
    height, width = shape
    # The camera's axes in the world: it looks along (cos, sin, 0), its y points down.
    right = np.array([math.sin(yaw), -math.cos(yaw), 0])
    down = np.array([0.0, 0.0, -1.0])
    forward = np.array([math.cos(yaw), math.sin(yaw), 0])
    x, y, z = local
    point = np.array(eye) + x * right + y * down + z * forward
    camera_to_world = np.eye(4)
    camera_to_world[:3] = np.stack([right, down, forward, np.array(eye)], axis=1)
    intrinsics = np.array([[focal[0], 0, width / 2], [0, focal[1], height / 3], [0, 0, 1]])

    found = project(Camera(intrinsics, np.linalg.inv(camera_to_world)), point, shape)

    assert found is not None
    u, v = found
    assert u == pytest.approx(0.5 + focal[0] * x / z / width, abs=1e-6)
    assert v == pytest.approx(1 / 3 + focal[1] * y / z / height, abs=1e-6)


@pytest.mark.parametrize("depth", [0.0, -0.5])
def test_a_point_not_in_front_of_the_camera_has_no_place(depth: float) -> None:
    camera = Camera(np.diag([100.0, 100.0, 1.0]), np.eye(4))
    assert project(camera, np.array([0.1, 0.1, depth]), (64, 64)) is None
