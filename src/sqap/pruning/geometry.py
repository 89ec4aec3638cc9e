"""Where a point of the world appears in the image."""

from __future__ import annotations

import numpy as np

from sqap.observation import Camera

Point = tuple[float, float]  # image coordinates (u, v), shares of the image's width and height


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
