"""Numbers that take long to measure, kept as they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqap.files import write_json


class Results:
    """Numbers measured so far, each with the mark of what it was measured on."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, mark: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under this name and mark, or what ``measure`` says now."""
        row = self._rows.get(name)
        if row is None or row["mark"] != mark:
            row = {"mark": mark, **measure()}
            self._rows[name] = row
            write_json(self._path, self._rows)
        return row
