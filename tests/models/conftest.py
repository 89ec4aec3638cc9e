"""A policy small enough for every test, with the reference policy's layout."""

from __future__ import annotations

import pytest

from sqap.models import VLA, ModelConfig, ModelInputs
from tests.families import family_config, random_inputs, random_model


@pytest.fixture
def config() -> ModelConfig:
    return family_config("diffusion")


@pytest.fixture
def model(config: ModelConfig) -> VLA:
    return random_model(config)


@pytest.fixture
def inputs(config: ModelConfig) -> ModelInputs:
    """A batch of three."""
    return random_inputs(config, 3)
