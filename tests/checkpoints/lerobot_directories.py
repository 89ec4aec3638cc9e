"""Changes to directories as LeRobot publishes them, and what the policies in them do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

import sqap
from sqap import Observation

Tensors = dict[str, Tensor]


def edit(directory: Path, **changes: Any) -> None:
    """Change top-level entries of the configuration; ``...`` removes one."""
    path = directory / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors, by name."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


def act(directory: Path, height: int, width: int) -> np.ndarray:
    """A chunk for two pictures of this size and a state of six numbers."""
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for name in ("top", "wrist")}
    return sqap.load(directory).act(Observation(images, "Open the Drawer", rng.standard_normal(6)), seed=3)
