"""From a training state to a policy directory, averaged weights and all."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from reference.blueprint import Blueprint
from sqap.checkpoints import LICENSE
from sqap.config import Origin, PolicyConfig
from sqap.environments.metaworld import CAMERA
from sqap.models import VLA, FlowHeadConfig
from sqap.policy import Policy
from sqap.processing import ActionUnits, Clamp, MeanStd, Range, stretched


def export(plan: Blueprint, directory: Path) -> int:
    """Write the policy in training to ``directory``; returns the training step it stems from."""
    saved = torch.load(plan.work / "training.pt", weights_only=True)
    prefix = "module.vla."
    weights = {k.removeprefix(prefix): v for k, v in saved["average"].items() if k.startswith(prefix)}
    model = VLA(plan.config)
    model.load_state_dict(weights)
    statistics = json.loads((plan.work / "statistics.json").read_text())
    low, high = tuple(statistics["q01"]), tuple(statistics["q99"])
    actions = Clamp(), Range(low, high, (True,) * plan.config.head.action_dim)
    images = tuple(stretched(vision.image_size) for vision in plan.config.vision)
    # Meta-World's units: a centimetre per unit and step; the fingers close above zero.
    units = ActionUnits(translation=(0, 1, 2), millimetres=10.0, gripper=3)
    family = "smolvla" if isinstance(plan.config.head, FlowHeadConfig) else "cogact"
    robot = plan.config.proprio_dim
    state = (
        (MeanStd(tuple(statistics["state_mean"][:robot]), tuple(statistics["state_std"][:robot])),)
        if robot
        else None
    )
    config = PolicyConfig(family, plan.config, (CAMERA,), images, actions, state=state, units=units)
    origin = Origin(plan.name, license=LICENSE)
    Policy(model, config, plan.tokenizer(), origin=origin).save(directory)
    return int(saved["step"])
