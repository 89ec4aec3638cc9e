"""The first frame of a connection: what the policy is, what it reads and what it gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from sqap.build import __version__
from sqap.kernels import cpu
from sqap.models.storage import stored_bytes
from sqap.policy import Policy
from sqap.processing import action_bounds
from sqap.serving.settings import ServerSettings


def action_dim(policy: Policy) -> int:
    """Dimensions of the policy's actions in robot units."""
    width = policy.config.model.head.action_dim
    for step in policy.config.actions:
        width = step.after(width)
    return width


def action_names(policy: Policy) -> list[str | None]:
    """``dx``, ``dy`` and ``dz`` displace the gripper, ``gripper`` opens and closes it; None is not known."""
    names: list[str | None] = [None] * action_dim(policy)
    units = policy.config.units
    if units is not None:
        for dimension, axis in zip(units.translation, "xyz", strict=False):
            names[dimension] = f"d{axis}"
        if units.gripper is not None:
            names[units.gripper] = "gripper"
    return names


def metadata(policy: Policy, settings: ServerSettings) -> dict[str, Any]:
    """Plain data. The names are explained in docs/serve.md."""
    config, head = policy.config, policy.config.model.head
    bounds = action_bounds(config.actions, head.action_dim)
    return {
        "server": "sqap",
        "versions": {"sqap": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "family": config.family,
        "fingerprint": policy.fingerprint,
        "recipe": policy.recipe.to_json(),
        "weight_bytes": stored_bytes(policy.model),
        "kernels": cpu.chosen(),
        "threads": torch.get_num_threads(),
        "device": str(policy.device),
        "cameras": list(config.cameras),
        "state_dim": config.state_dim,
        "horizon": head.horizon if settings.ensemble is None else 1,
        "action_dim": action_dim(policy),
        "action_names": action_names(policy),
        "action_units": None if config.units is None else dataclasses.asdict(config.units),
        "action_low": None if bounds is None else bounds[0].tolist(),
        "action_high": None if bounds is None else bounds[1].tolist(),
        "ensemble": settings.ensemble,
        "deadline_ms": None if settings.deadline_s is None else 1e3 * settings.deadline_s,
        "limits": dataclasses.asdict(settings.limits),
    }
