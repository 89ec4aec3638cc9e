"""``policy.json`` of version 3, before processing was lists of steps, as version 4 has it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqap.errors import CheckpointError, InputError
from sqap.processing import (
    ActionStep,
    ActionUnits,
    Binarize,
    Clamp,
    Crop,
    Lower,
    PromptConfig,
    Range,
    Scale,
    Template,
)
from sqap.serialization import from_json

VERSION = 3
HALVES = [0.5, 0.5, 0.5]


@dataclass(frozen=True)
class _Bounds:
    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]


@dataclass(frozen=True)
class _Actions(_Bounds):
    binarize: tuple[int, ...] = ()
    clip: bool = True


@dataclass(frozen=True)
class _Policy:
    """All but the model."""

    family: str
    cameras: tuple[str, ...]
    actions: _Actions
    prompt: str = "{instruction}"
    append_tokens: tuple[int, ...] = ()
    crop: float = 1.0
    proprio: _Bounds | None = None
    units: ActionUnits | None = None


def convert(policy: Any, where: str) -> dict[str, Any]:
    """The same policy in version 4. Its model is moved as it is, to be checked as version 4's.

    Raises:
        CheckpointError: the rest is not what version 3 says of a policy.
    """
    if not isinstance(policy, dict):
        raise CheckpointError(f"{where} must be an object, got {type(policy).__name__}")
    model = {"model": policy.pop("model")} if "model" in policy else {}
    old: _Policy = from_json(_Policy, policy, where, CheckpointError)
    try:
        return model | _steps(old) | {"images": [_images(each, old.crop) for each in _encoders(model)]}
    except InputError as problem:
        raise CheckpointError(f"{where}: {problem}") from problem


def _encoders(policy: dict[str, Any]) -> list[dict[str, Any]]:
    model = policy.get("model")
    vision = model.get("vision") if isinstance(model, dict) else None
    return [each for each in vision if isinstance(each, dict)] if isinstance(vision, list) else []


def _images(vision: dict[str, Any], crop: float) -> list[dict[str, Any]]:
    """The steps for an encoder, which loses its mean and deviation to them."""
    mean, std = (vision.pop(name, HALVES) for name in ("mean", "std"))
    cropped = [asdict(Crop(crop))] if crop != 1 else []
    stretch = {"kind": "stretch", "size": vision.get("image_size")}
    return [stretch, *cropped, asdict(Scale()), {"kind": "normalize", "mean": mean, "std": std}]


def _steps(old: _Policy) -> dict[str, Any]:
    """All but the model and the images."""
    bounds = old.actions
    clip, binarize = (Clamp(),) * bounds.clip, (Binarize(bounds.binarize),) * bool(bounds.binarize)
    actions: tuple[ActionStep, ...] = *clip, *binarize, Range(bounds.low, bounds.high, bounds.mask)
    state = None if old.proprio is None else (Range(**asdict(old.proprio)), Clamp())
    return {
        "family": old.family,
        "cameras": old.cameras,
        "actions": [asdict(step) for step in actions],
        "prompt": asdict(PromptConfig((Lower(), Template(old.prompt)), append=old.append_tokens)),
        "state": state and [asdict(step) for step in state],
        "units": old.units and asdict(old.units),
    }
