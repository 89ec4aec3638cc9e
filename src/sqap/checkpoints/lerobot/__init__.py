"""What LeRobot's policies on disk have in common. LeRobot itself is not imported."""

from sqap.checkpoints.lerobot.config import ACTION, STATE, LeRobotConfig, is_type, read_config
from sqap.checkpoints.lerobot.policy import Around, Defaults, find_tokenizer, padded, read_around
from sqap.checkpoints.lerobot.weights import (
    UNUSED,
    embedding,
    layers_table,
    open_weights,
    read_vision,
    table_name,
    vision_table,
)

__all__ = [
    "ACTION",
    "STATE",
    "UNUSED",
    "Around",
    "Defaults",
    "LeRobotConfig",
    "embedding",
    "find_tokenizer",
    "is_type",
    "layers_table",
    "open_weights",
    "padded",
    "read_around",
    "read_config",
    "read_vision",
    "table_name",
    "vision_table",
]
