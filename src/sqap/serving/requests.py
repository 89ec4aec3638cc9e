"""What a robot asks, and what it is answered: the contents of the frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sqap.errors import InputError, SqapError
from sqap.observation import Camera, Observation
from sqap.serving.settings import Limits

PREFIX = "observation/"  # openpi's flat keys: observation/NAME is an image or, for NAME "state", the state
KEYS = ("prompt", "images", "state", "cameras", "end_effector", "seed", "reset", "deadline_ms")

REFUSED = "refused: "  # begins a text frame after which the connection stays open


class Refused(SqapError):
    """This observation is not acted on, though another would be: it is late, or there are too many."""


@dataclass(frozen=True, eq=False)
class Request:
    """One observation of a robot.

    Args:
        observation: what it sees.
        seed: of the diffusion noise; None draws one.
        reset: a new episode begins with it.
        deadline_s: seconds after its arrival from which on nobody wants the answer.
    """

    observation: Observation
    seed: int | None = None
    reset: bool = False
    deadline_s: float | None = None


def read_request(message: Mapping[str, Any], limits: Limits) -> Request:
    """What `sqap.serving.wire.unpack` made of a robot's frame.

    Args:
        message: ``prompt``, and images as ``images`` (a map from cameras to uint8 arrays
            ``(height, width, 3)``) or one by one as ``observation/CAMERA``. Optional are ``state`` or
            ``observation/state``, ``cameras`` (a map to maps of ``intrinsics`` and ``world_to_camera``),
            ``end_effector``, ``seed``, ``reset`` and ``deadline_ms``.
        limits: of images and prompts.

    Raises:
        InputError: a key is unknown or lacks, or its value is not what it must be.
    """
    images, state = _images(message), message.get("state", message.get(f"{PREFIX}state"))
    for key in message:
        if key not in KEYS and not key.startswith(PREFIX):
            raise InputError(f"unknown key {key[:40]!r}; known keys: {', '.join(KEYS)}, {PREFIX}CAMERA")
    prompt = message.get("prompt")
    if not isinstance(prompt, str):
        raise InputError("the observation has no prompt; say in words what the robot should do")
    if len(prompt) > limits.prompt_characters:
        raise InputError(f"the prompt may have {limits.prompt_characters} characters, got {len(prompt)}")
    for name, image in images.items():
        if isinstance(image, np.ndarray) and max(image.shape, default=0) > limits.image_side:
            raise InputError(
                f"an image may be up to {limits.image_side} pixels wide and high, {name!r} is {image.shape}"
            )
    observation = Observation(
        images,
        prompt,
        _array("state", state),
        _cameras(message.get("cameras")),
        _array("end_effector", message.get("end_effector")),
    )
    return Request(observation, _seed(message), _reset(message), _deadline(message))


def write_request(
    observation: Observation,
    *,
    seed: int | None = None,
    reset: bool = False,
    deadline_s: float | None = None,
) -> dict[str, Any]:
    """The message that `read_request` makes the same request of."""
    message: dict[str, Any] = {"prompt": observation.instruction, "images": dict(observation.images)}
    cameras = {
        name: {"intrinsics": camera.intrinsics, "world_to_camera": camera.world_to_camera}
        for name, camera in observation.cameras.items()
    }
    optional = {
        "state": observation.state,
        "cameras": cameras or None,
        "end_effector": observation.end_effector,
        "seed": seed,
        "reset": reset or None,
        "deadline_ms": None if deadline_s is None else 1e3 * deadline_s,
    }
    return message | {key: value for key, value in optional.items() if value is not None}


def _images(message: Mapping[str, Any]) -> dict[str, Any]:
    images = message.get("images", {})
    if not isinstance(images, dict):
        raise InputError(f"images must be a map from cameras to arrays, got {type(images).__name__}")
    flat = {
        key.removeprefix(PREFIX): value
        for key, value in message.items()
        if key.startswith(PREFIX) and key != f"{PREFIX}state"
    }
    if both := images.keys() & flat.keys():
        raise InputError(f"camera {min(both)!r} has two images: in images and as {PREFIX}{min(both)}")
    return images | flat


def _array(name: str, value: object) -> np.ndarray | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    if not isinstance(value, np.ndarray) and not numbers:
        raise InputError(f"{name} must be an array or a list of numbers, got {type(value).__name__}")
    return np.asarray(value)


def _cameras(found: object) -> dict[str, Camera]:
    if found is None:
        return {}
    matrices = {"intrinsics", "world_to_camera"}
    if not isinstance(found, dict):
        raise InputError(f"cameras must be a map, got {type(found).__name__}")
    for name, camera in found.items():
        if not isinstance(camera, dict) or set(camera) != matrices:
            raise InputError(f"cameras[{name[:40]!r}] must be a map with intrinsics and world_to_camera")
        for value in camera.values():
            if not isinstance(value, np.ndarray):
                raise InputError(f"the matrices of cameras[{name[:40]!r}] must be arrays")
    return {name: Camera(**camera) for name, camera in found.items()}


def _seed(message: Mapping[str, Any]) -> int | None:
    seed = message.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
        raise InputError(f"seed must be an integer from 0 to 2**63 - 1, got {str(seed)[:40]}")
    return seed


def _reset(message: Mapping[str, Any]) -> bool:
    reset = message.get("reset", False)
    if not isinstance(reset, bool):
        raise InputError(f"reset must be true or false, got {str(reset)[:40]}")
    return reset


def _deadline(message: Mapping[str, Any]) -> float | None:
    deadline = message.get("deadline_ms")
    if deadline is None:
        return None
    if not isinstance(deadline, int | float) or isinstance(deadline, bool) or not 0 < deadline < 1e9:
        raise InputError(f"deadline_ms must be a positive number, got {str(deadline)[:40]}")
    return deadline / 1e3
