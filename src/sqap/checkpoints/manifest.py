"""``policy.json``: reading it, and refusing what no policy can be. A hash is no proof of sense."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from sqap.checkpoints import version3
from sqap.config import Calibration, PolicyConfig
from sqap.errors import CheckpointError, InputError
from sqap.models import DecoderConfig, ModelConfig, VisionConfig
from sqap.processing import ActionStep, StateStep, image_problems
from sqap.recipe import Recipe
from sqap.serialization import parse_json, read_bytes

FORMAT_VERSION = 4
MANIFEST, WEIGHTS, TOKENIZER = "policy.json", "model.safetensors", "tokenizer.json"
KEYS = {"format", "version", "policy", "recipe", "calibration", "source", "linears", "sha256"}
MAY_BE_ZERO = {"registers", "last_token"}  # of a model's whole numbers


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """The content of ``policy.json`` and its SHA-256, with all files of the policy there.

    Raises:
        CheckpointError: there is none, it is of another version, or files are missing.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory} is not an sqap policy: it has no {MANIFEST}")
    content = read_bytes(path, CheckpointError)
    manifest = parse_json(content, path, CheckpointError)
    if not isinstance(manifest, dict) or manifest.get("format") != "sqap":
        raise CheckpointError(f"{path} does not describe an sqap policy")
    if manifest.get("version") not in (version3.VERSION, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} is of version {manifest.get('version')}; this sqap reads versions "
            f"{version3.VERSION} and {FORMAT_VERSION}"
        )
    if set(manifest) != KEYS:
        raise CheckpointError(f"{path} must have exactly the keys {', '.join(sorted(KEYS))}")
    if not isinstance(manifest["sha256"], dict) or set(manifest["sha256"]) != {WEIGHTS, TOKENIZER}:
        raise CheckpointError(f"{path}: sha256 must be of {WEIGHTS} and {TOKENIZER}")
    if not isinstance(manifest["source"], str | None):
        raise CheckpointError(f"{path}: source must be a hash or null")
    for name in (WEIGHTS, TOKENIZER):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} is incomplete: {name} is missing")
    if manifest["version"] == version3.VERSION:
        manifest["policy"] = version3.convert(manifest["policy"], f"{path}: policy")
    return manifest, hashlib.sha256(content).hexdigest()


def check_config(config: PolicyConfig, where: str) -> None:
    """Refuse a configuration whose parts do not fit each other, or that no robot can be driven by.

    Raises:
        CheckpointError: with the first problem.
    """
    for problem in _problems(config):
        raise CheckpointError(f"{where}.{problem}")


def check_calibration(
    calibration: Calibration | None, recipe: Recipe, model: ModelConfig, where: str
) -> None:
    """Refuse numbers that calibration cannot have found.

    Raises:
        CheckpointError: with the first problem.
    """
    if calibration is None:
        return
    pruning = recipe.pruning
    budget = 0 if pruning is None else pruning.budget(model.grid**2)
    if calibration.frames < 1:
        raise CheckpointError(f"{where}.frames must be at least 1, got {calibration.frames}")
    if calibration.top_k is not None and not 0 <= calibration.top_k <= budget:
        raise CheckpointError(f"{where}.top_k must be from 0 to {budget}, got {calibration.top_k}")
    if calibration.overlap is not None and not 0 <= calibration.overlap <= 1:
        raise CheckpointError(f"{where}.overlap must be in [0, 1], got {calibration.overlap}")
    if calibration.recall is not None and not 0 <= calibration.recall <= 1:
        raise CheckpointError(f"{where}.recall must be in [0, 1], got {calibration.recall}")
    if calibration.layers is not None:
        first, last = 0 if pruning is None else pruning.last_layer, model.decoder.depth - 1
        if not calibration.layers or not all(first <= layer <= last for layer in calibration.layers):
            raise CheckpointError(
                f"{where}.layers must be from {first} to {last}, got {list(calibration.layers)}"
            )


def _problems(config: PolicyConfig) -> Iterator[str]:
    model, action_dim = config.model, config.model.head.action_dim
    yield from _sizes(model, "model")
    for i, vision in enumerate(model.vision):
        yield from _vision(vision, model.vision[0], f"model.vision[{i}]")
    yield from _decoder(model.decoder)
    yield from (f"model.head{fault}" for fault in model.head.faults())
    if len(config.cameras) != model.cameras or len(set(config.cameras)) != len(config.cameras):
        yield f"cameras must be {model.cameras} different names, got {', '.join(config.cameras) or 'none'}"
    if len(config.images) != len(model.vision):
        yield f"images must be {len(model.vision)} lists, one for each encoder, got {len(config.images)}"
    for i, (steps, vision) in enumerate(zip(config.images, model.vision, strict=False)):
        yield from (f"images[{i}]{problem}" for problem in image_problems(steps, vision.image_size))
    action_dim = yield from _widths(config.actions, action_dim, "actions")
    yield from _state(config)
    executed, horizon = config.n_action_steps, model.head.horizon
    if executed is not None and not 1 <= executed <= horizon:
        yield f"n_action_steps must be from 1 to {horizon}, the actions of a chunk, or null, got {executed}"
    outside = [i for i in config.prompt.append if not 0 <= i < model.decoder.vocabulary]
    if outside:
        yield f"prompt.append must be from 0 to {model.decoder.vocabulary - 1}, got {outside[0]}"
    if config.units is not None:
        gripper = () if config.units.gripper is None else (config.units.gripper,)
        yield from _dimensions(config.units.translation, action_dim, "units.translation")
        yield from _dimensions(gripper, action_dim, "units.gripper")
        if config.units.millimetres <= 0:
            yield f"units.millimetres must be positive, got {config.units.millimetres}"


def _state(config: PolicyConfig) -> Iterator[str]:
    model, in_text = config.model, config.model.state_in == "text"
    if config.prompt.tells_state != in_text:
        yield "prompt must tell the {state} where model.state_in is 'text', and nowhere else"
    if in_text and model.proprio_dim is not None:
        yield "model.proprio_dim must be null where model.state_in is 'text'"
    elif (config.state is None) != (model.proprio_dim is None and not in_text):
        yield "state and model.proprio_dim must both be given or both be null"
    elif config.state is not None:
        state_dim = yield from _widths(config.state, config.state_dim, "state")
        if not in_text and state_dim != model.proprio_dim:
            yield f"state makes {state_dim} numbers, but model.proprio_dim is {model.proprio_dim}"


def _sizes(config: Any, where: str) -> Iterator[str]:
    """Every whole number of a model's configuration counts something."""
    for field in dataclasses.fields(config):
        name, value = f"{where}.{field.name}", getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        if not values:
            yield f"{name} must not be empty"
        for item in values:
            if dataclasses.is_dataclass(item):
                yield from _sizes(item, name)
            elif type(item) is int and field.name != "take_block":
                least = 0 if field.name in MAY_BE_ZERO else 1
                if item < least:
                    yield f"{name} must be at least {least}, got {item}"


def _vision(vision: VisionConfig, first: VisionConfig, where: str) -> Iterator[str]:
    if vision.image_size % vision.patch_size:
        yield f"{where}: patches of {vision.patch_size} do not cut an image of {vision.image_size} evenly"
    if vision.grid != first.grid:
        yield f"{where} has {vision.grid} patches a side, but the first encoder has {first.grid}"
    if vision.width % vision.heads:
        yield f"{where}: {vision.heads} heads do not share a width of {vision.width} evenly"
    if not -vision.depth <= vision.take_block < vision.depth:
        yield f"{where}.take_block must name one of {vision.depth} blocks, got {vision.take_block}"
    if vision.norm_eps < 0:
        yield f"{where}.norm_eps must not be negative, got {vision.norm_eps}"


def _decoder(decoder: DecoderConfig) -> Iterator[str]:
    if decoder.heads % decoder.kv_heads:
        yield f"model.decoder: {decoder.heads} heads do not share {decoder.kv_heads} keys evenly"
    if decoder.head_dim % 2:
        yield f"model.decoder.head_dim must be even, got {decoder.head_dim}"
    if decoder.rope_theta <= 0 or decoder.norm_eps < 0:
        yield "model.decoder: rope_theta must be positive and norm_eps not negative"


def _widths(steps: Sequence[ActionStep | StateStep], width: int, where: str) -> Generator[str, None, int]:
    """Steps that do not take what the one before gives; returns how many dimensions there are behind them."""
    for i, step in enumerate(steps):
        try:
            width = step.after(width)
        except InputError as problem:
            yield f"{where}[{i}]: {problem}"
    return width


def _dimensions(chosen: tuple[int, ...], count: int, where: str) -> Iterator[str]:
    if len(set(chosen)) != len(chosen) or any(not 0 <= i < count for i in chosen):
        yield f"{where} must be different dimensions from 0 to {count - 1}, got {list(chosen)}"
