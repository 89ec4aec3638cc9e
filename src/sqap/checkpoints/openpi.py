"""pi0 and pi0.5 as openpi's own ``convert_jax_model_to_pytorch.py`` writes them.

``model.safetensors`` has the tensors that LeRobot has, ``config.json`` sizes and no type, and
``assets/<data set>/norm_stats.json`` the statistics of states and actions. What openpi does besides is code
of each robot's, which no file holds: the cameras must be named, and actions that are relative to the state,
or grippers that are turned around, come out as the model has them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqap.checkpoints import lerobot, pi0
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.known_keys import OPENPI
from sqap.checkpoints.lerobot import ACTION, NONE, STATE, Around, LeRobotConfig, Normalization, Statistics
from sqap.checkpoints.opened import CONFIG, Opened
from sqap.checkpoints.settings import positive
from sqap.errors import CheckpointError
from sqap.processing import EndWith, PromptConfig, Spaces, Take
from sqap.serialization import read_object

logger = logging.getLogger("sqap")

STATS = "norm_stats.json"
FEATURES = {STATE: "state", ACTION: "actions"}
# Added to deviations and to ranges, of states and of actions, whatever they are.
EPSILON = 1e-6
WIDENED = "std", "q99"
SIZES = ("action_dim", 32), ("action_horizon", 50)
CAMERAS = 3  # a model has been trained with: from the base, on the left and on the right wrist


def recognise(directory: Path) -> bool:
    """Whether ``directory`` is openpi's, converted to PyTorch."""
    config = read_object(directory / CONFIG, CheckpointError)
    return "paligemma_variant" in config and "type" not in config


def open(directory: Path, choices: Choices) -> Opened:
    """Open a directory that was recognised.

    Raises:
        CheckpointError: something is missing, damaged, does not fit or is not supported.
    """
    path = directory / CONFIG
    data = read_object(path, CheckpointError)
    OPENPI.check(data, str(path))
    choices.refuse("openpi's conversion", "chunk", "bounds", "ema", "film")
    tensors = lerobot.open_weights(directory)
    kind = pi0.PI05 if "model.time_mlp_in.weight" in tensors.tensors else pi0.PI0
    cameras = _cameras(path, choices.cameras)
    width, horizon = (positive(data, name, default, path) for name, default in SIZES)
    around = _around(directory, kind, cameras, width, choices.unnorm_key)
    config = LeRobotConfig(path, data, cameras, None, width, horizon, horizon, width, width)
    logger.warning(
        "%s: openpi's transforms of a robot's states and actions (relative actions, turned grippers) are in "
        "no file, and are not done",
        directory,
    )
    return pi0.assemble(directory, choices, config, tensors, kind, around)


def _cameras(path: Path, given: tuple[str, ...] | None) -> tuple[str, ...]:
    if given is None or not 0 < len({*given}) == len(given) <= CAMERAS:
        raise CheckpointError(
            f"{path} does not name the policy's cameras: name up to {CAMERAS} different ones as cameras "
            "(--cameras base,left_wrist,right_wrist), in the order of training: from the base, on the left "
            "wrist, on the right" + ("" if given is None else f"; got {', '.join(given)}")
        )
    return given


def _around(directory: Path, kind: pi0.Kind, cameras: tuple[str, ...], width: int, key: str | None) -> Around:
    statistics = _statistics(directory, key)
    mode = kind.defaults.modes[ACTION.upper()]
    steps = {}
    for feature in (STATE, ACTION):
        values = statistics.of(feature, key) if key != NONE else None
        length = width if values is None else len(values["mean"])
        if length > width:
            raise CheckpointError(
                f"{statistics.where}: {FEATURES[feature]} has {length} numbers, and the model's have {width}"
            )
        steps[feature] = length, Normalization(feature, mode, length, 0.0).step(statistics, key)
    (state_dim, state), (action_dim, action) = steps[STATE], steps[ACTION]
    take = (Take(action_dim),) if action_dim < width else ()
    text = kind.defaults.steps if kind is pi0.PI05 else (Spaces(), EndWith("\n"))
    return Around(
        cameras,
        PromptConfig(text, kind.defaults.longest),
        (lerobot.identity(state_dim) if state is None else state,),
        take if action is None else (*take, action),
        kind.defaults.tokenizer,
    )


def _statistics(directory: Path, key: str | None) -> Statistics:
    """Those of each data set under ``assets``, with what openpi adds to them.

    Raises:
        CheckpointError: there are none, they are malformed, or ``key`` is none of them.
    """
    assets = directory / "assets"
    files = {str(path.parent.relative_to(assets)): path for path in sorted(assets.rglob(STATS))}
    groups = {name: _group(path) for name, path in files.items()}
    if len(groups) == 1:
        groups[""] = next(iter(groups.values()))
    found = Statistics(str(assets), groups)
    lerobot.check_dataset([found], key)
    if not groups and key != NONE:
        raise CheckpointError(
            f"{assets} has no {STATS}, by which states and actions are normalised; unnorm_key {NONE} "
            f"(--unnorm-key {NONE}) leaves them as the model has them"
        )
    return found


def _group(path: Path) -> dict[str, dict[str, tuple[float, ...]]]:
    data = read_object(path, CheckpointError)
    data = data.get("norm_stats", data)
    return {feature: _values(path, name, data) for feature, name in FEATURES.items()}


def _values(path: Path, name: str, data: Any) -> dict[str, tuple[float, ...]]:
    """The statistics of one feature; those that are null are left out."""
    mine = data.get(name) if isinstance(data, Mapping) else None
    if not isinstance(mine, Mapping):
        raise CheckpointError(f"{path} has no statistics of {name!r}")
    found = {}
    for statistic, numbers in mine.items():
        if numbers is None:
            continue
        if not isinstance(numbers, list) or not all(type(x) in (int, float) for x in numbers):
            raise CheckpointError(f"{path}: {name}.{statistic} must be a list of numbers")
        added = EPSILON if statistic in WIDENED else 0.0
        found[statistic] = tuple(float(x) + added for x in numbers)
    if "mean" not in found:
        raise CheckpointError(f"{path}: {name} has no mean")
    return found
