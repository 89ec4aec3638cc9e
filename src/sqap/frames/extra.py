"""The libraries that only LeRobot datasets need."""

from __future__ import annotations

import importlib
from typing import Any

from sqap.errors import InputError


def import_extra(module: str) -> Any:
    """A module of the ``lerobot`` extra.

    Raises:
        InputError: the extra is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f'reading a LeRobotDataset needs pyarrow and av ({error}); pip install "sqap[lerobot]"'
        ) from error
