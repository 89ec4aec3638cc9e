"""From the conventions of vla-eval's benchmarks to a policy's: names of images, rotations, grippers."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sqap.errors import InputError
from sqap.observation import Observation

ROTATION, GRIPPER, WIDTH = slice(3, 6), 6, 7  # of an action: displacement, rotation, gripper


@dataclass(frozen=True)
class Conversion:
    """The section ``sqap`` of a configuration.

    Args:
        cameras: camera of the policy -> image of the benchmark; images that are not in it keep their names.
        rotation: whether actions' rotations are Euler angles (``"euler"``), which become the rotation vectors
            that controllers take, or such vectors already.
        gripper: ``"as_is"``, or ``"close_positive"`` to turn 0, closed, and 1, open, into 1 and -1.
        metres: displacement of the gripper's target in a control step, per unit of the first three numbers of
            an action; without it neither jerk nor path length is measured.
        hz: control steps per second.
    """

    cameras: dict[str, str] = field(default_factory=dict)
    rotation: Literal["axis_angle", "euler"] = "axis_angle"
    gripper: Literal["as_is", "close_positive"] = "as_is"
    metres: float | None = None
    hz: float = 1.0

    def __post_init__(self) -> None:
        if not self.hz > 0:
            raise InputError(f"hz must be positive, got {self.hz}")
        if self.metres is not None and self.hz == 1.0:
            raise InputError("metres needs hz, too")

    @property
    def changes_actions(self) -> bool:
        return self.rotation != "axis_angle" or self.gripper != "as_is"

    def action(self, action: np.ndarray) -> np.ndarray:
        """Actions ``(..., action_dim)`` of a policy as the benchmark takes them, float32.

        Raises:
            InputError: there is a rotation or a gripper to convert, and actions do not have `WIDTH` numbers.
        """
        action = np.array(action, dtype=np.float32)
        if self.changes_actions and action.shape[-1] != WIDTH:
            raise InputError(
                f"actions of {action.shape[-1]} numbers have no rotation and gripper that could be converted"
            )
        if self.rotation == "euler":
            action[..., ROTATION] = rotation_vector(action[..., ROTATION])
        if self.gripper == "close_positive":
            action[..., GRIPPER] = 1 - 2 * action[..., GRIPPER]
        return action

    def observation(self, seen: Mapping[str, Any]) -> Observation:
        """What the benchmark sent, as the policy reads it.

        Raises:
            InputError: an image that ``cameras`` names was not sent, or what was sent is no observation.
        """
        images = {name: array(image) for name, image in (seen.get("images") or {}).items()}
        for camera, image in self.cameras.items():
            if image not in images:
                raise InputError(
                    f"{camera} is to be {image}, but the benchmark sends {', '.join(images) or 'no image'}; "
                    "its params, such as send_wrist_image, say what it sends"
                )
        names = {image: camera for camera, image in self.cameras.items()}
        state = seen.get("states", seen.get("state"))
        return Observation(
            {names.get(name, name): image for name, image in images.items()},
            str(seen.get("task_description", "")),
            None if state is None else array(state),
        )


def array(value: Any) -> np.ndarray:
    """An array that `vla_eval_process.plain` wrote."""
    if not isinstance(value, dict):
        return np.array(value)
    content = np.frombuffer(base64.b64decode(value["data"]), dtype=np.dtype(value["dtype"]))
    return content.reshape(value["shape"])


def rotation_vector(euler: np.ndarray) -> np.ndarray:
    """Rotation vectors ``(..., 3)`` of Euler angles about the fixed axes x, y and z, in this order."""
    half = np.asarray(euler, dtype=np.float64) / 2
    (sx, sy, sz), (cx, cy, cz) = np.moveaxis(np.sin(half), -1, 0), np.moveaxis(np.cos(half), -1, 0)
    w = cx * cy * cz + sx * sy * sz
    xyz = np.stack(
        [sx * cy * cz - cx * sy * sz, cx * sy * cz + sx * cy * sz, cx * cy * sz - sx * sy * cz], axis=-1
    )
    xyz, w = xyz * np.where(w < 0, -1, 1)[..., None], np.abs(w)  # the shorter of the two ways round
    sine = np.linalg.norm(xyz, axis=-1)
    scale = np.where(sine > 1e-9, 2 * np.arctan2(sine, w) / np.maximum(sine, 1e-9), 2.0)
    vector: np.ndarray = xyz * scale[..., None]
    return vector
