"""From a training state to a policy directory, averaged weights and all."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from reference.blueprint import Blueprint
from sqap.config import PolicyConfig
from sqap.environments.metaworld import CAMERA
from sqap.models import VLA
from sqap.policy import Policy
from sqap.processing import ActionStatistics, ActionUnits


def export(plan: Blueprint, directory: Path) -> int:
    """Write the policy in training to ``directory``; returns the training step it stems from."""
    saved = torch.load(plan.work / "training.pt", weights_only=True)
    prefix = "module.vla."
    weights = {k.removeprefix(prefix): v for k, v in saved["average"].items() if k.startswith(prefix)}
    model = VLA(plan.config)
    model.load_state_dict(weights)
    statistics = json.loads((plan.work / "statistics.json").read_text())
    actions = ActionStatistics(
        low=tuple(statistics["q01"]),
        high=tuple(statistics["q99"]),
        mask=(True,) * plan.config.head.action_dim,
    )
    # Meta-World's units: a centimetre per unit and step; the fingers close above zero.
    units = ActionUnits(translation=(0, 1, 2), millimetres=10.0, gripper=3)
    config = PolicyConfig("cogact", plan.config, (CAMERA,), actions, units=units)
    Policy(model, config, plan.tokenizer()).save(directory)
    return int(saved["step"])
