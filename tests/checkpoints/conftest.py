"""Published directories in small, written once and copied for each test that spoils one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from published import FAMILIES, TINY, write_openvla_oft

from sqap.checkpoints.opened import Opened
from sqap.models import VLA

# Bridge policies come with the robot's state and without; `published` writes them without.
WRITERS = FAMILIES | {"oft-bridge": partial(write_openvla_oft, platform="bridge")}
Publish = Callable[[str], Path]
Load = Callable[[Opened], dict[str, torch.Tensor]]


class Payload:
    """Creates a directory when it is unpickled by something that runs what pickles say."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Publish:
    """``written("cogact")``: a family's directory, for tests that only read it."""
    directories: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in directories:
            directories[family] = tmp_path_factory.mktemp(family) / family
            WRITERS[family](directories[family], TINY, 0)
        return directories[family]

    return write


@pytest.fixture
def publish(written: Publish, tmp_path: Path) -> Publish:
    """``publish("cogact")``: a copy of a family's directory, to be spoilt."""
    return lambda family: Path(shutil.copytree(written(family), tmp_path / family))


@pytest.fixture
def load() -> Load:
    """``load(published)``: the whole model's state, every parameter read."""

    def read(published: Opened) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            model = VLA(published.config.model)
        model.load_state_dict(published.weights.read(model.state_dict()), assign=True)
        return model.state_dict()

    return read


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    """Code to be put into a pickle; its ``marker`` exists once it has run."""
    return Payload(tmp_path / "executed")
