"""The model skeleton: vision -> projector -> decoder -> action head, in plain PyTorch."""

from sqap.models.config import DecoderConfig, DiffusionHeadConfig, ModelConfig, VisionConfig
from sqap.models.vla import VLA

__all__ = ["VLA", "DecoderConfig", "DiffusionHeadConfig", "ModelConfig", "VisionConfig"]
