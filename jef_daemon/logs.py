"""Logs: structlog on standard error, JSON lines or a readable console; or systemd's journal. Libraries' own, too."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from jef_daemon.errors import SettingsError
from jef_daemon.journal import ADD_PLACE, Journal, fields, is_behind
from jef_daemon.sections import Logging

_QUIET = ("aiormq", "aio_pika", "asyncio", "alembic", "uvicorn", "sqlalchemy")
"""Libraries whose warnings only are of interest."""
_SILENT = ("aiormq.connection", "aiormq.channel")
"""What these warn of, the bus says in our words, once."""


def configure(settings: Logging, stream: Any = None) -> None:
    """Set logging up for this process.

    Args:
        settings: format and level.
        stream: where to; None: standard error.

    Raises:
        SettingsError: see `check`.
    """
    check(settings)
    stream = stream or sys.stderr
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    factory: Any = structlog.WriteLoggerFactory(stream)
    shared: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    stamped = [
        *shared,
        structlog.processors.TimeStamper("iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    match _format(settings, stream):
        case "journal":
            # Its socket is opened once; the journal knows the time.
            journal = Journal(settings.journal_socket, stream)
            factory = lambda *_: journal  # noqa: E731
            chosen = [*shared, structlog.processors.format_exc_info, ADD_PLACE, fields]
        case "console":
            # A pretty traceback would show variables, secrets among them.
            trace = structlog.dev.plain_traceback
            console = structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=trace)
            chosen = [*stamped, console]
        case _:
            json_lines = structlog.processors.JSONRenderer(default=str)
            chosen = [*stamped, structlog.processors.format_exc_info, _event_first, json_lines]
    structlog.configure(
        processors=chosen,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=factory,
        cache_logger_on_first_use=False,  # a reload may change the level
    )
    _route_libraries(level)


def check(settings: Logging) -> None:
    """Whether logs can be written so.

    Raises:
        SettingsError: the journal is wanted, and there is none.
    """
    if settings.format == "journal" and not settings.journal_socket.is_socket():
        raise SettingsError(
            f"logging.format is journal, and no journal listens at {settings.journal_socket}; "
            'set format = "auto", or journal_socket'
        )


def _format(settings: Logging, stream: Any) -> str:
    if settings.format != "auto":
        return settings.format
    if is_behind(stream) and settings.journal_socket.is_socket():
        return "journal"
    return "console" if stream.isatty() else "json"


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
