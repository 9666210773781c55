"""Times, durations, locks and statuses as people write and read them."""

from __future__ import annotations

import re
import time
from datetime import datetime

from jef_daemon.errors import SettingsError

STYLES = {
    "QUEUED": "dim",
    "WAITING_FOR_LOCK": "yellow",
    "RUNNING": "cyan",
    "COMPLETED": "green",
    "FAILED": "bold red",
    "CANCELLED": "magenta",
    "TIMED_OUT": "bold yellow",
}
"""Colour of each status."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def duration_s(text: str) -> float:
    """`90`, `90s`, `15m`, `2h`, `30d` in seconds.

    Raises:
        SettingsError: it is no duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw]?)", text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is no duration; write 90s, 15m, 2h, 30d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def ago(text: str) -> float:
    """`2h` (ago) or an RFC 3339 instant, as UTC seconds since the epoch.

    Raises:
        SettingsError: it is neither.
    """
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError:
        return time.time() - duration_s(text)


def when(instant: float | None) -> str:
    """A local time, to the second; a dash for never."""
    return (
        "-" if instant is None else datetime.fromtimestamp(instant).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    )


def took(seconds: float | None) -> str:
    """`1:02:03`, `12.3 s`; a dash for unknown."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def lock_of(text: str, mode: str = "EXCLUSIVE") -> dict[str, str]:
    """`resource` or `resource:SHARED` as on the wire; without a mode behind it, in the given one."""
    resource, sign, said = text.rpartition(":")
    if sign and said.upper() in {"SHARED", "EXCLUSIVE"}:
        return {"resource": resource, "mode": said.upper()}
    return {"resource": text, "mode": mode}


def styled(status: str) -> str:
    """A status with its colour, for rich."""
    return f"[{STYLES.get(status, 'white')}]{status}[/]"
