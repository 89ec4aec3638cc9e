"""What LeRobot's policies on disk have in common. LeRobot itself is not imported."""

from sqap.checkpoints.lerobot.config import ACTION, STATE, LeRobotConfig, is_type, read_config
from sqap.checkpoints.lerobot.policy import (
    STATE_PROMPT,
    Around,
    Defaults,
    find_tokenizer,
    padded,
    read_around,
)
from sqap.checkpoints.lerobot.processors import STATE_TEXT
from sqap.checkpoints.lerobot.weights import (
    UNUSED,
    check_depth,
    embedding,
    layers_table,
    open_weights,
    read_by,
    read_vision,
    table_name,
    vision_table,
)

__all__ = [
    "ACTION",
    "STATE",
    "STATE_PROMPT",
    "STATE_TEXT",
    "UNUSED",
    "Around",
    "Defaults",
    "LeRobotConfig",
    "check_depth",
    "embedding",
    "find_tokenizer",
    "is_type",
    "layers_table",
    "open_weights",
    "padded",
    "read_around",
    "read_by",
    "read_config",
    "read_vision",
    "table_name",
    "vision_table",
]
