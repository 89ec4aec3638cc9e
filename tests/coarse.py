"""A recipe so coarse that its errors show on small policies, and replays that measure them."""

import dataclasses
from collections.abc import Callable

from sqap import Observation, Policy
from sqap.processing import ActionUnits
from sqap.recipe import Pruning, Quantization, Scheme
from sqap.sensitivity import Replay

UNITS = ActionUnits(translation=(0, 1, 2), millimetres=10.0, gripper=3)
COARSE = Quantization(
    Scheme(4, 4),
    vision=Scheme(4, 8),
    projector=Scheme(4, 8),
    head=Scheme(4, 8),
    sensitive=Scheme(4, 8),
    rotate=False,
)


def coarse_replay(policy: Policy, observe: Callable[..., Observation], pruning: Pruning) -> Replay:
    """A replay of three frames by ``policy``, whose actions then have `UNITS`."""
    policy.config = dataclasses.replace(policy.config, units=UNITS)
    return Replay(policy, [observe(seed) for seed in range(3)], pruning)
