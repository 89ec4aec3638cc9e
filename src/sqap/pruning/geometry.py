"""Where a point of the world appears in the image, and in the part of it that a policy looks at."""

from __future__ import annotations

import numpy as np

from sqap.observation import Camera

Point = tuple[float, float]  # image coordinates (u, v), shares of the image's width and height


def into_crop(point: Point, area: float) -> Point:
    """Coordinates in the image to those in its central part of that ``area``, a share; it may lie outside."""
    u, v = (0.5 + (share - 0.5) / area**0.5 for share in point)
    return u, v


def out_of_crop(point: Point, area: float) -> Point:
    """The inverse of `into_crop`."""
    u, v = (0.5 + (share - 0.5) * area**0.5 for share in point)
    return u, v


def project(camera: Camera, point: np.ndarray, image_shape: tuple[int, int]) -> Point | None:
    """Image coordinates (u, v) of a world point, as shares of the image's width and height.

    Args:
        camera: the pinhole camera that took the image.
        point: ``(3,)``, metres, world frame.
        image_shape: height and width of the captured image, the one ``camera.intrinsics`` is for.

    Returns:
        (u, v), outside [0, 1] when the point is out of the picture; None when it is behind the camera.
    """
    in_camera = camera.world_to_camera[:3, :3] @ point + camera.world_to_camera[:3, 3]
    if in_camera[2] <= 0:
        return None
    x, y, depth = camera.intrinsics @ in_camera
    height, width = image_shape
    return float(x / depth / width), float(y / depth / height)
