"""The model skeleton: vision -> projector -> decoder -> action head, in plain PyTorch."""

from sqap.models.config import (
    DecoderConfig,
    DiffusionHeadConfig,
    FlowHeadConfig,
    HeadConfig,
    ModelConfig,
    RegressionHeadConfig,
    TokenHeadConfig,
    VisionConfig,
)
from sqap.models.inputs import ModelInputs
from sqap.models.vla import VLA, empty_model

__all__ = [
    "VLA",
    "DecoderConfig",
    "DiffusionHeadConfig",
    "FlowHeadConfig",
    "HeadConfig",
    "ModelConfig",
    "ModelInputs",
    "RegressionHeadConfig",
    "TokenHeadConfig",
    "VisionConfig",
    "empty_model",
]
