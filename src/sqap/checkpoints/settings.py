"""Numbers of a published configuration, checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sqap.errors import CheckpointError

T = TypeVar("T", int, float)
# No model has wider layers or larger images; what a file says is not built before it is checked.
MOST = 1 << 24


def positive(config: Mapping[str, Any], name: str, default: T, where: Path, most: int = MOST) -> T:
    """A positive number of a configuration, or what it is where that is silent.

    Raises:
        CheckpointError: it is not a positive number up to ``most``.
    """
    value = config.get(name)
    if value is None:
        return default
    if type(value) not in (int, type(default)) or not 0 < value <= most:
        raise CheckpointError(
            f"{where}: {name} must be a positive {type(default).__name__} up to {most}, got {value!r}"
        )
    return type(default)(value)
