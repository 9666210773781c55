"""Reads a program's output as it comes: progress, a message, and the end of it to keep."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

_LINE_BYTES = 16_384
"""A line is cut here: a program may never end one."""
_BREAK = re.compile(rb"[\r\n]")


@dataclass(frozen=True, slots=True)
class Patterns:
    """What is looked for in each line."""

    progress: re.Pattern[str] | None
    duration: re.Pattern[str] | None
    message: re.Pattern[str] | None

    @classmethod
    def of(cls, progress: str | None, duration: str | None, message: str | None) -> Self:
        """Compile them."""
        return cls(*(re.compile(text) if text else None for text in (progress, duration, message)))


class Output:
    """Takes bytes, reports what they tell.

    Args:
        patterns: what is looked for.
        tail_bytes: how much of the end is kept.
        report: takes percent and message.
    """

    def __init__(
        self, patterns: Patterns, tail_bytes: int, report: Callable[[float | None, str | None], object]
    ) -> None:
        self._patterns = patterns
        self._tail_bytes = tail_bytes
        self._report = report
        self._open = b""
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._whole_s = 0.0
        self.message = ""
        """The last one found."""

    def feed(self, chunk: bytes) -> None:
        """Take what came."""
        self._keep(chunk)
        *lines, self._open = _BREAK.split(self._open + chunk)
        for line in lines:
            self._look(line)
        if len(self._open) > _LINE_BYTES:
            self._look(self._open)
            self._open = b""

    def close(self) -> None:
        """The output has ended; its last line may lack its end."""
        if self._open:
            self._look(self._open)
            self._open = b""

    @property
    def tail(self) -> str:
        """The end of the output."""
        return (
            b"".join(self._kept)[-self._tail_bytes :].decode("utf-8", "replace") if self._tail_bytes else ""
        )

    def _keep(self, chunk: bytes) -> None:
        self._kept.append(chunk)
        self._kept_bytes += len(chunk)
        while self._kept_bytes - len(self._kept[0]) >= self._tail_bytes and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popleft())

    def _look(self, raw: bytes) -> None:
        line = raw[:_LINE_BYTES].decode("utf-8", "replace")
        patterns = self._patterns
        if patterns.duration and (found := patterns.duration.search(line)):
            with contextlib.suppress(ValueError):  # "N/A"
                self._whole_s = _seconds(found["duration"] or "")
        percent = None
        if patterns.progress and (found := patterns.progress.search(line)):
            percent = self._percent(found)
        message = None
        if patterns.message and (found := patterns.message.search(line)):
            message = self.message = ((found.re.groups and found[1]) or found[0]).strip()
        if percent is not None or message is not None:
            self._report(percent, message)

    def _percent(self, found: re.Match[str]) -> float | None:
        groups = found.groupdict()
        try:
            if groups.get("percent"):
                return float(groups["percent"])
            if groups.get("total"):
                return 100 * float(groups["done"]) / float(groups["total"])
            if groups.get("time") and self._whole_s:
                return 100 * _seconds(groups["time"]) / self._whole_s
        except (TypeError, ValueError, ZeroDivisionError):
            return None
        return None


def _seconds(text: str) -> float:
    """`01:02:03.5` as seconds."""
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total
