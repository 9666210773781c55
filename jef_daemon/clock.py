"""The wall clock as it was last looked at.

Waiting goes by the monotonic clock, records by the wall clock. Where the two part, the wall clock was set or the
machine was suspended; who keeps ends of leases or deadlines in the ledger has to move them before it decides by the
new time.
"""

from __future__ import annotations

from jef_daemon.ports import Clock, SystemClock

_STEP_S = 5.0
"""A wall clock that moves so far against the monotonic one was set; by less, it is being adjusted, and is followed."""


class SteadyClock:
    """A clock that goes on evenly until it is looked at, however the wall clock is set meanwhile.

    Args:
        clock: the machine's; None: the system's.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._skew_s = self._looked_at()

    def monotonic(self) -> float:
        """Seconds from an arbitrary point; never goes back."""
        return self._clock.monotonic()

    def now(self) -> float:
        """UTC seconds since the epoch, by the last look."""
        return self._skew_s + self._clock.monotonic()

    def until(self, wall: float) -> float:
        """The monotonic clock's time at one of the wall clock's."""
        return wall - self._skew_s

    def look(self) -> float:
        """Follow the wall clock; returns by how many seconds it was set, ahead or back; 0: it was not."""
        before, self._skew_s = self._skew_s, self._looked_at()
        by_s = self._skew_s - before
        return by_s if abs(by_s) > _STEP_S else 0.0

    def _looked_at(self) -> float:
        return self._clock.now() - self._clock.monotonic()
