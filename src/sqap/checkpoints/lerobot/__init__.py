"""What LeRobot's policies on disk have in common. LeRobot itself is not imported."""

from sqap.checkpoints.lerobot.config import ACTION, STATE, LeRobotConfig, is_type, read_config
from sqap.checkpoints.lerobot.normalizers import NONE, Normalization, Statistics, check_dataset, identity
from sqap.checkpoints.lerobot.opening import open_policy, read_head
from sqap.checkpoints.lerobot.policy import (
    STATE_PROMPT,
    Around,
    Defaults,
    padded,
    read_around,
)
from sqap.checkpoints.lerobot.processors import STATE_TEXT
from sqap.checkpoints.lerobot.weights import (
    embedding,
    layers_table,
    open_weights,
    read_vision,
    table_name,
    vision_table,
)

__all__ = [
    "ACTION",
    "NONE",
    "STATE",
    "STATE_PROMPT",
    "STATE_TEXT",
    "Around",
    "Defaults",
    "LeRobotConfig",
    "Normalization",
    "Statistics",
    "check_dataset",
    "embedding",
    "identity",
    "is_type",
    "layers_table",
    "open_policy",
    "open_weights",
    "padded",
    "read_around",
    "read_config",
    "read_head",
    "read_vision",
    "table_name",
    "vision_table",
]
