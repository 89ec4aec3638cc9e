"""A whole policy in small, with random weights, and observations it can act on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which then needs no GPU
with contextlib.suppress(ImportError):
    import triton  # noqa: F401 - behind OSMesa, whose LLVM is another one, importing Triton crashes

import numpy as np
import pytest
from hypothesis import Phase, settings

import sqap.environments  # noqa: F401 - before any test imports MuJoCo, which then reads MUJOCO_GL
from sqap import Camera, Observation, Policy
from sqap.evaluation import settings as evaluation_settings
from tests.tiny import CAMERA, tiny_policy

# By default an example that takes 0.2 s fails, which it may for other work on the machine.
settings.register_profile("usual", deadline=None)
settings.load_profile("usual")
# The same few examples every time, and none made smaller: what `mutmut` asks of tests.
settings.register_profile(
    "mutation",
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
)

# The disk takes 5 to 30 ms to confirm a file, and tests write thousands. Which files are confirmed, in what
# order, is tested with functions that record it (test_files.py, test_native.py, test_log.py).
os.fsync = lambda descriptor: None

# `make test` has a process for every core; a worker of `sqap eval` with as many threads waits for itself.
evaluation_settings.available_cores = lambda: 1

MakeObservation = Callable[..., Observation]


@pytest.fixture
def policy() -> Policy:
    """16 visual tokens, two decoder layers, random weights; acts on Meta-World's camera."""
    return tiny_policy()


@pytest.fixture
def observe() -> MakeObservation:
    """``observe(seed=0, calibrated=True)``: a noise image, with or without camera and pose."""

    def make(seed: int = 0, *, calibrated: bool = True, instruction: str = "open the drawer") -> Observation:
        image = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        camera = Camera(np.array([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]), np.eye(4))
        return Observation(
            images={CAMERA: image},
            instruction=instruction,
            cameras={CAMERA: camera} if calibrated else {},
            end_effector=np.array([0.1, 0.0, 1.0]) if calibrated else None,
        )

    return make


@pytest.fixture
def saved(policy: Policy, tmp_path: Path) -> Path:
    """The policy on disk."""
    policy.save(tmp_path / "policy")
    return tmp_path / "policy"
