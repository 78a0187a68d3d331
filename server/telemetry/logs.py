"""Structured logs: one JSON object per line on stderr. Control characters are escaped; nothing here holds a prompt."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from math import isfinite
from typing import Any

from server.config.sections import LogLevel

LOGGER = logging.getLogger("undertow.server")


class JsonFormatter(logging.Formatter):
    """A record as one line. Fields passed as `extra={"fields": {...}}` stand beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            # Where, not what: an exception's text may hold what a client sent.
            line["exception"] = record.exc_info[0].__name__
            line["at"] = [
                f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(record.exc_info[2])
            ]
        # A NaN score is not JSON.
        plain = {
            key: str(value) if isinstance(value, float) and not isfinite(value) else value
            for key, value in line.items()
        }
        return json.dumps(plain, default=str, allow_nan=False)


def configure(level: LogLevel) -> None:
    """Send this process's logs to stderr. HTTP libraries speak up only for warnings: their lines hold URLs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    set_level(level)


def set_level(level: LogLevel) -> None:
    """The least severe level that is written."""
    LOGGER.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(max(logging.getLevelName(level.upper()), logging.INFO))


def log(level: int, message: str, **fields: object) -> None:
    """One line with fields."""
    LOGGER.log(level, message, extra={"fields": fields})
