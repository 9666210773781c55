"""What a daemon does, in one line for people: `systemctl status` shows it.

Read from what the parts know already; nothing is asked for it but how many wait for locks, which is how the ledger is
asked whether it answers (`supervision`).
"""

from __future__ import annotations

import asyncio
import time

from jef_daemon.assembly import Parts
from jef_daemon.ledger import SqlLedger
from jef_daemon.reload import Reloads


class Status:
    """The line.

    Args:
        parts: of the daemon.
        ledger: its.
        reloads: whether one is under way, and what came of the last.
        ready: set once requests are consumed.
        haste: set when a stop is hastened.
    """

    def __init__(
        self, parts: Parts, ledger: SqlLedger, reloads: Reloads, ready: asyncio.Event, haste: asyncio.Event
    ) -> None:
        self._parts, self._ledger, self._reloads = parts, ledger, reloads
        self._ready, self._haste = ready, haste
        self._waiting = 0
        """Executions that wait for locks, as the ledger said last."""
        self._drain_until: float | None = None
        """Monotonic: when running jobs are interrupted; None: it does not stop."""

    def stopping(self, drain_s: float) -> None:
        """It stops; running jobs have so long."""
        self._drain_until = time.monotonic() + drain_s

    async def ledger_answers(self, patience_s: float) -> bool:
        """Whether the ledger does (`supervision.Answers`)."""
        is_alive = await self._ledger.is_alive(patience_s)
        if is_alive and self._ledger.stalled is None:
            self._waiting = await self._ledger.waiting_for_locks()
        return is_alive

    def line(self) -> str:
        """What it does now."""
        if self._drain_until is not None:
            return self._stop(self._drain_until)
        running, queued = self._parts.worker.running, sum(self._parts.backlog.queued.values())
        counts = [f"{running} running", f"{queued} queued", f"{self._waiting} waiting for locks"]
        return ", ".join([*counts, *self._troubles()])

    def is_steady(self) -> bool:
        """Whether it neither starts nor reloads."""
        return self._ready.is_set() and not self._reloads.under_way

    def _stop(self, until: float) -> str:
        running = self._parts.worker.running
        if not running:
            return "stopping: telling what is left to tell"
        left_s = until - time.monotonic()
        if self._haste.is_set() or left_s <= 0:
            return f"stopping: interrupting {running} running"
        return f"stopping: {running} still running, {left_s:.0f} s left"

    def _troubles(self) -> list[str]:
        """What is not as it should be, or not yet."""
        found = []
        if not self._parts.bus.connected.is_set():
            is_known = self._ready.is_set()
            found.append("broker reconnecting" if is_known else "no broker yet: trying to connect")
        elif self._parts.bus.is_blocked:
            found.append("the broker takes no messages: it is short of memory or disk")
        if self._ledger.stalled:
            found.append(str(self._ledger.stalled))
        if self._reloads.under_way:
            found.append("reloading")
        elif self._reloads.refused:
            found.append("the last reload was refused, see the log")
        return found
