"""Clocks that move when told, and a time in which nobody waits."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


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


class _Jumping(selectors.DefaultSelector):
    """Where nobody has anything to do, it is as late as the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready now; instead of waiting, the time is moved on."""
        ready = super().select(0 if timeout else timeout)
        if not ready and timeout:
            self.ahead_s += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return super().time() + self._jumping.ahead_s


def run_at_once(test: Coroutine[Any, Any, T]) -> T:
    """Run what waits for time alone: its hours pass at once, in their order. Threads and sockets would be too late."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(test)
