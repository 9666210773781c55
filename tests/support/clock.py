"""A clock that moves when told."""

from __future__ import annotations


class ManualClock:
    """Both of a clock's readings; a test sets `time`."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def now(self) -> float:
        """UTC seconds since the epoch."""
        return self.time

    def monotonic(self) -> float:
        """Seconds."""
        return self.time
