"""The server's log: one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

from sqap.errors import one_line

logger = logging.getLogger("sqap.serving")


class JsonLines(logging.Formatter):
    """Time, level, event, and whatever `event` was given, in one line; an exception in a few words."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": one_line(record.getMessage()),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            problem = record.exc_info[1]
            line["problem"] = one_line(f"{type(problem).__name__}: {problem}")[:500]
            if record.levelno >= logging.CRITICAL:  # a bug: where it is
                line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def event(level: int, name: str, /, *, problem: BaseException | None = None, **fields: Any) -> None:
    """Log what happened, with the ids of whom it happened to."""
    logger.log(level, name, extra={"fields": fields}, exc_info=problem)


def set_up(verbose: bool) -> None:
    """Write the server's log to stderr, every request in it if ``verbose``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    # Of websockets, which logs each frame at DEBUG.
    logger.getChild("websockets").setLevel(logging.WARNING)
