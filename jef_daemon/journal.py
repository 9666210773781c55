"""Logs as systemd's journal keeps them: each event with fields that can be looked for, not a line of text.

    journalctl -u jef-daemon JEF_EXECUTION_ID=624
    journalctl -u jef-daemon JEF_EVENT=finished JEF_ACTION=transcode -p warning -o verbose

What an event says is in fields named `JEF_` and its name in capitals; `MESSAGE` has all of it in a line for people,
`PRIORITY` the level, `CODE_FILE`, `CODE_LINE` and `CODE_FUNC` the place. How fields are written, large ones in a sealed
memory file, is the library's part (`logging_journald`).
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, TextIO

import structlog
from logging_journald import JournaldTransport

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog."""
_PLACE = {"pathname": "CODE_FILE", "lineno": "CODE_LINE", "func_name": "CODE_FUNC"}
_NOT_IN_A_NAME = re.compile(r"[^A-Z0-9_]")
_NAME_CHARACTERS = 64
JournaldTransport.VALUE_LEN_STRUCT = struct.Struct("<Q")
"""The length of a long value is little-endian, whatever the machine; the library writes it as the machine does."""
_SEND_S = 2.0
"""A journal that takes nothing for longer is not waited for: the event loop stands meanwhile."""

ADD_PLACE = structlog.processors.CallsiteParameterAdder(
    {
        structlog.processors.CallsiteParameter.PATHNAME,
        structlog.processors.CallsiteParameter.LINENO,
        structlog.processors.CallsiteParameter.FUNC_NAME,
    },
    additional_ignores=["logging", "jef_daemon.logs"],
)
"""The processor that `fields` needs for the place."""


def is_behind(stream: TextIO, environ: Mapping[str, str] | None = None) -> bool:
    """Whether what is written to a stream goes to the journal: systemd names device and inode in `JOURNAL_STREAM`."""
    named = (os.environ if environ is None else environ).get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it is no file
        return False
    return named == f"{found.st_dev}:{found.st_ino}"


class Journal:
    """A logger (for structlog) that sends fields to the journal; what cannot be sent is written to a stream instead.

    Args:
        path: of the journal's socket.
        otherwise: where to, in lines of JSON.
    """

    def __init__(self, path: Path, otherwise: TextIO) -> None:
        # Addressed anew each time, as libsystemd does: a journal that was restarted has another socket there.
        self._transport = JournaldTransport(path, connected=False)
        self._transport.socket.settimeout(_SEND_S)
        self._otherwise = otherwise

    def msg(self, **told: str) -> None:
        """Send one event."""
        try:
            self._transport.send(told.items())
        except OSError as error:
            lost = {**told, "JEF_NOT_IN_THE_JOURNAL": str(error)}
            self._otherwise.write(json.dumps(lost) + "\n")
            self._otherwise.flush()

    log = debug = info = warning = warn = error = critical = exception = fatal = failure = err = msg


def fields(logger: object, method: str, event: MutableMapping[str, Any]) -> Mapping[str, str]:
    """The last processor: an event as the journal's fields."""
    place = {field: str(event.pop(name)) for name, field in _PLACE.items() if name in event}
    level = str(event.pop("level", "info"))
    name = str(event.pop("event", ""))
    exception = event.pop("exception", None)
    values = {key: _text(value) for key, value in event.items() if value is not None}
    message = " ".join([name, *(f"{key}={_quoted(value)}" for key, value in values.items())])
    found = {
        "MESSAGE": message if exception is None else f"{message}\n{exception}",
        "PRIORITY": str(_PRIORITIES.get(level, 6)),
        "SYSLOG_IDENTIFIER": "jef",
        **place,
        "JEF_EVENT": name,
        **{_named(key): value for key, value in values.items()},
    }
    if exception is not None:
        found["JEF_EXCEPTION"] = str(exception)
    return {key: _encodable(value) for key, value in found.items()}


def _named(key: str) -> str:
    return f"JEF_{_NOT_IN_A_NAME.sub('_', key.upper())}"[:_NAME_CHARACTERS]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _quoted(value: str) -> str:
    is_plain = value and not any(character in value for character in ' ="\n')
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _encodable(value: str) -> str:
    """Without halves of characters, which no UTF-8 can hold."""
    return value.encode("utf-8", "backslashreplace").decode()
