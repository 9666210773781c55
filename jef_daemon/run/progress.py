"""Many reports, few notifications: at most one in an interval, and the last one always."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from jef_daemon.events import Progressed

Emit = Callable[[Progressed], object]
"""Records and tells a progress; calls take effect in order."""


class Progress:
    """The progress of one job.

    The RUNNING notification counts as the first, so a job shorter than the interval tells its last
    progress together with its end, in one transaction.

    Args:
        interval_s: shortest time between two notifications.
        emit: where to.
    """

    __slots__ = (
        "_closed",
        "_due",
        "_emit",
        "_interval_s",
        "_loop",
        "_message",
        "_next_at",
        "_pending",
        "_percent",
    )

    def __init__(self, interval_s: float, emit: Emit) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval_s = interval_s
        self._emit = emit
        self._next_at = self._loop.time() + interval_s
        self._percent: int | None = None
        self._message: str | None = None
        self._pending = False
        self._due: asyncio.TimerHandle | None = None
        self._closed = False

    def report(self, percent: int | None, message: str | None) -> None:
        """Take a report; None keeps what was reported before."""
        percent = self._percent if percent is None else percent
        message = self._message if message is None else message
        if self._closed or (percent, message) == (self._percent, self._message):
            return
        self._percent, self._message, self._pending = percent, message, True
        if self._loop.time() >= self._next_at:
            self._tell()
        elif self._due is None:
            self._due = self._loop.call_at(self._next_at, self._tell)

    def rest(self) -> list[Progressed]:
        """What was reported and not told yet, at the end of the job. Nothing is told after this."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._closed = True
        told, self._pending = self._pending, False
        return [self._event()] if told else []

    def _tell(self) -> None:
        self._due = None
        if self._pending:
            self._pending = False
            self._next_at = self._loop.time() + self._interval_s
            self._emit(self._event())

    def _event(self) -> Progressed:
        return Progressed(progress=self._percent, message=self._message)
