"""How log lines look: plain for people, JSON for machines. One handler, set up once by the composition root.

A line may carry fields (`extra=fields(...)`); they are names, numbers, outcomes, never text of a prompt or answer.
"""

import logging
import sys
import time
from typing import TextIO

import orjson


def fields(**values: object) -> dict[str, object]:
    """The `extra` of a log call, shown as `key=value` or as members of the JSON object. None values are left out."""
    return {"fields": {key: value for key, value in values.items() if value is not None}}


class PlainFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO logger: message key=value`, then the traceback if there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(shown)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        """A line; the fields stand between the message and the traceback."""
        record.shown = "".join(f" {key}={value}" for key, value in getattr(record, "fields", {}).items())
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (epoch seconds), level, logger, message, the fields, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """A line without a raw line break in it, whatever the message holds."""
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure(level: str = "info", *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Send every logger's lines of at least `level` to `stream` (standard error by default)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("sse_starlette").setLevel(logging.WARNING)  # it would log every chunk's text at debug
