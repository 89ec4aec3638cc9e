"""What LeRobot reads of an sqap policy: three JSON files beside sqap's own.

LeRobot's plug-in ``lerobot_policy_sqap`` runs the policy; these files tell LeRobot its type, its features and
the steps around it. Normalising is no such step, since `sqap.Policy` does it. sqap itself reads none of them,
and the policy's fingerprint does not cover them. Layout: LeRobot 0.6.1, ``PreTrainedConfig`` and
``PolicyProcessorPipeline``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqap.checkpoints.lerobot.config import ACTION, STATE
from sqap.checkpoints.lerobot.processors import AFTER, BEFORE, IDLE, RENAME
from sqap.checkpoints.opened import CONFIG
from sqap.config import PolicyConfig
from sqap.observation import feature_name

EXPORTED = (CONFIG, BEFORE, AFTER)
TYPE = "sqap"
TO_BATCH, DEVICE = IDLE


def export(config: PolicyConfig, directory: Path) -> None:
    """Write the three files of a policy."""
    contents = dict(zip(EXPORTED, (describe(config), *processors()), strict=True))
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe(config: PolicyConfig) -> dict[str, Any]:
    """LeRobot's configuration of a policy.

    The shape of an image is the first vision encoder's. It tells LeRobot nothing but that there are images:
    the policy resizes whatever size it gets.
    """
    size = config.model.vision[0].image_size
    features = {feature_name(camera): _feature("VISUAL", 3, size, size) for camera in config.cameras}
    if config.state is not None:
        features[STATE] = _feature("STATE", config.state_dim)
    return {
        "type": TYPE,
        "input_features": features,
        "output_features": {ACTION: _feature("ACTION", config.action_dim)},
        "n_action_steps": config.n_action_steps or config.model.head.horizon,
        "device": "cpu",
    }


def processors() -> tuple[dict[str, Any], dict[str, Any]]:
    """The steps before and behind the policy.

    Renaming and moving to a device stand there to be set: LeRobot's tools override both, and an override
    without its step is an error.
    """
    to_device = _step(DEVICE, device="cpu", float_dtype=None)
    before = [_step(RENAME, rename_map={}), _step(TO_BATCH), to_device]
    return {"name": "policy_preprocessor", "steps": before}, {
        "name": "policy_postprocessor",
        "steps": [to_device],
    }


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}
