"""``config.json`` of LeRobot's policies: what all families of it say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqap.checkpoints.known_keys import Keys
from sqap.checkpoints.opened import CONFIG
from sqap.checkpoints.settings import positive
from sqap.errors import CheckpointError
from sqap.observation import short_name
from sqap.serialization import read_object

STATE, ACTION = "observation.state", "action"
# Cameras that a policy is told of and that no robot has: LeRobot gives it black pictures that nothing reads.
EMPTY = "observation.images.empty_camera_"
# LeRobot's default width of states and actions, which shorter ones are padded to.
PADDED = 32


@dataclass(frozen=True)
class LeRobotConfig:
    """What all of LeRobot's configurations say.

    Args:
        path: of ``config.json``.
        data: all of it.
        cameras: the policy's image features, in order, without empty ones.
        state_dim: numbers of the robot's state; None if there is no such feature.
        action_dim: numbers of an action that the robot takes.
        horizon: actions of a chunk.
        n_action_steps: actions of a chunk that are executed before the next.
        padded_state: width that a state is padded to.
        padded_action: width that actions, and their noise, are padded to.
    """

    path: Path
    data: Mapping[str, Any]
    cameras: tuple[str, ...]
    state_dim: int | None
    action_dim: int
    horizon: int
    n_action_steps: int
    padded_state: int
    padded_action: int

    def number(self, name: str, default: int) -> int:
        """A positive whole number.

        Raises:
            CheckpointError: it is something else.
        """
        return positive(self.data, name, default, self.path)

    def square(self, name: str, size: int) -> None:
        """Refuse a pair of sides that are not the vision encoder's ``size``.

        Raises:
            CheckpointError: it is another pair; LeRobot's model would see something else, or fail.
        """
        sides = self.data.get(name, [size, size])
        if sides != [size, size]:
            raise CheckpointError(
                f"{self.path}: {name} is {sides}, but the vision encoder reads images of {size} x {size}, "
                "and nothing else is supported"
            )


def is_type(directory: Path, kinds: Sequence[str]) -> bool:
    """Whether a directory's configuration is of one of LeRobot's types."""
    return read_object(directory / CONFIG, CheckpointError).get("type") in kinds


def read_config(directory: Path, keys: Keys) -> LeRobotConfig:
    """The configuration of a directory that was recognised.

    Raises:
        CheckpointError: it is malformed, says what sqap does not compute, or its weights are an adapter's.
    """
    path = directory / CONFIG
    data = read_object(path, CheckpointError)
    if data.get("use_peft"):
        raise CheckpointError(
            f"{path}: use_peft is set, and the directory holds a LoRA adapter: merge it into its base "
            "(peft's merge_and_unload), save that with save_pretrained, and give the merged policy"
        )
    keys.check(data, str(path))
    inputs, outputs = (_features(data, name, path) for name in ("input_features", "output_features"))
    cameras = tuple(n for n, (kind, _) in inputs.items() if kind == "VISUAL" and not n.startswith(EMPTY))
    if not cameras:
        raise CheckpointError(f"{path}: input_features has no camera, a feature of type VISUAL")
    padded_state, padded_action = (
        positive(data, f"max_{what}_dim", PADDED, path) for what in ("state", "action")
    )
    state_dim = _length(inputs, STATE, padded_state, path) if STATE in inputs else None
    action_dim = _length(outputs, ACTION, padded_action, path) if ACTION in outputs else padded_action
    horizon = positive(data, "chunk_size", 50, path)
    n_action_steps = positive(data, "n_action_steps", horizon, path)
    if n_action_steps > horizon:
        raise CheckpointError(f"{path}: n_action_steps is {n_action_steps}, more than the chunk of {horizon}")
    return LeRobotConfig(
        path,
        data,
        cameras,
        state_dim,
        action_dim,
        horizon,
        n_action_steps,
        padded_state,
        padded_action,
    )


def choose_cameras(
    config: LeRobotConfig, names: Sequence[str], given: tuple[str, ...] | None
) -> tuple[str, ...]:
    """What the images that are read are called, in the policy's order.

    Args:
        config: the policy's.
        names: what an observation calls its cameras.
        given: the user's choice. Names that are all the policy's own, long or short, choose those, and the
            others are left out, as LeRobot masks them. Any other names are new ones for all cameras.

    Raises:
        CheckpointError: there is no such choice.
    """
    if given is None:
        return tuple(names)
    own = [{name, short_name(name), feature} for name, feature in zip(names, config.cameras, strict=True)]
    places = [next((i for i, each in enumerate(own) if name in each), None) for name in given]
    known = [place for place in places if place is not None]
    if given and len({*known}) == len(given):
        return tuple(name for _, name in sorted(zip(known, given, strict=True)))
    moved = any(place not in (None, i) for i, place in enumerate(places))
    if len(given) == len(names) and len({*given}) == len(given) and not moved:
        return given
    raise CheckpointError(
        f"{config.path}: the policy's cameras are {', '.join(names)}, and cameras (--cameras) must name some "
        f"of these, or all {len(names)} anew in this order; got {', '.join(given)}"
    )


def _features(data: Mapping[str, Any], name: str, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Features by name: their kind and shape."""
    features = data.get(name) or {}
    found = {}
    if not isinstance(features, dict):
        raise CheckpointError(f"{path}: {name} must be an object of features")
    for key, feature in features.items():
        kind, shape = (feature.get(k) if isinstance(feature, dict) else None for k in ("type", "shape"))
        if not isinstance(kind, str) or not isinstance(shape, list) or not all(type(s) is int for s in shape):
            raise CheckpointError(f"{path}: {name}.{key} must have a type and a shape, got {feature!r}")
        found[key] = kind, tuple(shape)
    return found


def _length(features: Mapping[str, tuple[str, tuple[int, ...]]], name: str, padded: int, path: Path) -> int:
    """The length of a vector that is padded.

    Raises:
        CheckpointError: it is none, or longer than that.
    """
    _, shape = features[name]
    if len(shape) != 1 or not 0 < shape[0] <= padded:
        raise CheckpointError(
            f"{path}: {name} has the shape {list(shape)}; supported are vectors of up to {padded} numbers"
        )
    return shape[0]
