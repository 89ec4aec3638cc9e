"""What a policy is given at each step. Everything is checked here, once; inside, it is trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sqap.errors import InputError

# Before a camera's name in LeRobot's datasets and policies, the longer first.
CAMERA_PREFIXES = "observation.images.", "observation."


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: where a point of the world lands in the image.

    Args:
        intrinsics: ``(3, 3)`` matrix K, in pixels of the image as it was captured.
        world_to_camera: ``(4, 4)`` matrix [R | t], metres, with x right, y down and z forward.

    Raises:
        InputError: a matrix has the wrong shape or holds a value that is not finite.
    """

    intrinsics: np.ndarray
    world_to_camera: np.ndarray

    def __post_init__(self) -> None:
        for name, shape in (("intrinsics", (3, 3)), ("world_to_camera", (4, 4))):
            value = _numbers(f"camera {name}", getattr(self, name))
            if value.shape != shape or not np.isfinite(value).all():
                raise InputError(
                    f"camera {name} must be a finite {shape[0]}x{shape[1]} matrix, got shape {value.shape}"
                )
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Observation:
    """One moment as the robot sees it. Arrays are copied: a camera's buffer may be written to again.

    Args:
        images: camera name -> uint8 array ``(height, width, 3)``, RGB.
        instruction: what to do, in words.
        state: optional proprioception ``(state_dim,)``, in the units the policy was trained on.
        cameras: optional camera name -> `Camera`, for the images whose camera is calibrated.
        end_effector: optional position ``(3,)`` of the gripper's centre, metres, world frame.

    Raises:
        InputError: with the field's name, what was found and what is expected.
    """

    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray | None = None
    cameras: Mapping[str, Camera] = field(default_factory=dict)
    end_effector: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.images, Mapping) or not isinstance(self.cameras, Mapping):
            raise InputError(
                "images and cameras must be dictionaries from camera names to arrays and Cameras"
            )
        if not self.images:
            raise InputError("an observation needs at least one image, got none")
        for name, image in self.images.items():
            _check_image(name, image)
        object.__setattr__(self, "images", {name: image.copy() for name, image in self.images.items()})
        if not isinstance(self.instruction, str) or not self.instruction.strip():
            raise InputError("the instruction is empty; say in words what the robot should do")
        for name, camera in self.cameras.items():
            if not isinstance(camera, Camera):
                raise InputError(f"cameras[{name!r}] must be a Camera, got {type(camera).__name__}")
            if name not in self.images:
                raise InputError(
                    f"a camera matrix is given for {name!r}, but the images are {sorted(self.images)}"
                )
        object.__setattr__(self, "cameras", dict(self.cameras))
        if self.state is not None:
            object.__setattr__(self, "state", _finite_vector("state", self.state, None))
        if self.end_effector is not None:
            object.__setattr__(self, "end_effector", _finite_vector("end_effector", self.end_effector, 3))


def short_name(camera: str) -> str:
    """A camera's name without LeRobot's prefix: ``top`` for ``observation.images.top``."""
    prefix = next((prefix for prefix in CAMERA_PREFIXES if camera.startswith(prefix)), "")
    return camera.removeprefix(prefix)


def feature_name(camera: str) -> str:
    """What LeRobot calls a camera's images: ``observation.images.top`` for ``top``."""
    return camera if camera.startswith(CAMERA_PREFIXES) else f"{CAMERA_PREFIXES[0]}{camera}"


def find_camera(camera: str, names: Collection[str]) -> str | None:
    """The one of ``names`` that a policy's ``camera`` is: it itself, or else its short name; None if none."""
    return next((name for name in (camera, short_name(camera)) if name in names), None)


def hash_frames(frames: Sequence[Observation]) -> str:
    """SHA-256 over what calibration reads of observations: images, their shapes, instructions and states.

    Not over camera matrices and the end effector's position: calibration looks at neither.
    """
    digest = hashlib.sha256()

    def add(kind: str, shape: tuple[int, ...], content: bytes) -> None:
        # How long everything is comes first, so that no two sequences of parts run together.
        digest.update(json.dumps([kind, shape, len(content)]).encode() + content)

    for frame in frames:
        add("instruction", (), frame.instruction.encode())
        for name in sorted(frame.images):
            add(f"image {name}", frame.images[name].shape, frame.images[name].tobytes())
        if frame.state is not None:
            add("state", frame.state.shape, frame.state.tobytes())
    return digest.hexdigest()


def _check_image(name: str, image: object) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = f"{image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"image {name!r} must be a uint8 array of shape (H, W, 3), got {found}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"image {name!r} must be a uint8 array of shape (H, W, 3), got shape {image.shape}")


def _numbers(name: str, value: object) -> np.ndarray:
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as problem:
        raise InputError(f"{name} must be an array of numbers: {problem}") from problem


def _finite_vector(name: str, value: np.ndarray, length: int | None) -> np.ndarray:
    vector = _numbers(name, value)
    if vector.ndim != 1 or (length is not None and vector.shape != (length,)):
        expected = "a vector" if length is None else f"a vector of {length} numbers"
        raise InputError(f"{name} must be {expected}, got shape {vector.shape}")
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise InputError(f"{name}[{bad[0]}] is {vector[bad[0]]}; every entry must be finite")
    return vector
