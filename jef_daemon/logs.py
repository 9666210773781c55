"""Logs: structlog on standard error, JSON lines or a readable console; libraries' own logs go the same way."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from jef_daemon.settings import Logging

_QUIET = ("aiormq", "aio_pika", "asyncio", "alembic", "uvicorn", "sqlalchemy")
"""Libraries whose warnings only are of interest."""
_SILENT = ("aiormq.connection", "aiormq.channel")
"""What these warn of, the bus says in our words, once."""


def configure(settings: Logging, stream: Any = None) -> None:
    """Set logging up for this process.

    Args:
        settings: format and level.
        stream: where to; None: standard error.
    """
    stream = stream or sys.stderr
    is_console = settings.format == "console" or (settings.format == "auto" and stream.isatty())
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper("iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Any] = [structlog.dev.ConsoleRenderer(colors=stream.isatty())]
    if not is_console:
        last = [
            structlog.processors.format_exc_info,
            _event_first,
            structlog.processors.JSONRenderer(default=str),
        ]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,  # a reload may change the level
    )
    _route_libraries(level)


def _event_first(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {"event": event.pop("event", ""), **event}


class _ToStructlog(logging.Handler):
    """Hands a library's record to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            logger = structlog.get_logger().bind(logger=record.name)
            level = min(logging.CRITICAL, record.levelno // 10 * 10)  # a library may have levels of its own
            logger.log(level, "library", detail=record.getMessage(), exc_info=record.exc_info or None)
        except Exception:  # noqa: BLE001  a record that cannot be written must not stop whoever wrote it
            self.handleError(record)


def _route_libraries(level: int) -> None:
    root = logging.getLogger()
    root.handlers[:] = [_ToStructlog()]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
