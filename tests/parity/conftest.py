"""Figures of the authors' own classes, and the directories that they were given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sqap
from sqap import Observation, Policy
from sqap.models import ModelInputs
from sqap.models.storage import fill

TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Upstream:
    """What upstream computed, and our policy on the same files.

    Args:
        notes: versions, the writer's arguments, observations and prompts.
        arrays: what was recorded.
        policy: ours.
    """

    notes: dict[str, Any]
    arrays: dict[str, Tensor]
    policy: Policy

    def observation(self, i: int) -> Observation:
        """The i-th: noise images as the notes say, and the state that upstream was given."""
        seen, images = self.notes["observations"][i], {}
        for number, camera in enumerate(self.policy.config.cameras):
            rng = np.random.default_rng(seen["seed"] + 100_000 * number)
            images[camera] = rng.integers(0, 256, (seen["height"], seen["width"], 3), dtype=np.uint8)
        state = self.arrays["proprio"][i].numpy() if "proprio" in self.arrays else None
        return Observation(images, seen["instruction"], state)

    def inputs(self, i: int) -> ModelInputs:
        """What our model is given for it."""
        return self.policy.inputs(self.observation(i), torch.Generator())


MakeUpstream = Callable[..., Upstream]


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> MakeUpstream:
    """``upstream("openvla")``: writes the directory anew, as the notes of that name say, and loads it.

    ``unnorm_key`` chooses another data set, ``ema`` writes averaged weights too and takes them; other options
    go to the writer.
    """
    made: dict[tuple[str, Any], Upstream] = {}

    def make(name: str, **options: Any) -> Upstream:
        key = name, tuple(options.items())
        if key not in made:
            notes = json.loads((TESTS / "fixtures" / f"{name}.json").read_text())
            directory = tmp_path_factory.mktemp(name)
            writer = notes["writer"] | {k: v for k, v in options.items() if k != "unnorm_key"}
            write, sizes = getattr(published, writer.pop("function")), getattr(published, writer.pop("sizes"))
            write(directory, sizes, **writer)
            unnorm_key = options.get("unnorm_key", notes["unnorm_key"])
            policy = sqap.load(directory, unnorm_key=unnorm_key, ema=options.get("ema", False))
            assert policy.weights is not None
            fill(policy.model, policy.weights, dtype=torch.float32)  # as upstream was run
            made[key] = Upstream(notes, load_file(TESTS / "fixtures" / f"{name}.safetensors"), policy)
        return made[key]

    return make
