"""ROLE: the watcher. It flags RUNNING executions that fell silent TIMED_OUT, and ends what waited or ran too long.

Part in the flow: notifications of executions that may fall silent come from `jef.status` with their deadlines, into
a timer structure in memory. When one runs out the ledger is asked, and what the ledger says is so: an update whose
notification has not come here yet has moved the deadline there. A restart and a new connection read all deadlines
from the ledger, and whatever no notification told is found there by its time, half a second late.

What it does not do: decide what is true (`ledger.watching`), or retry (`retry`, in the ledger).

Waiting goes by the monotonic clock, records by the wall clock. Where the two part, the wall clock was set or the
machine was suspended: then what is to come is put off by as much, for nobody could send an update meanwhile.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Protocol

import structlog
from pydantic_core import from_json

from jef_daemon.clock import SteadyClock
from jef_daemon.ports import Clock, Consequences, Delivery, Silence

log = structlog.get_logger()

TICK_S = 0.5
"""How often the ledger is looked through for clocks that ran out."""
_AT_ONCE = 250
"""Executions in one transaction."""
_PAGE = 2000
"""Deadlines that are read at once."""
_LAG_S = 1.0
"""A watcher that flags later than that says so."""
BEHIND_S = 5.0
"""One that is so far behind does not work."""
_TOLD_TO_S = 0.001
"""Deadlines are told in milliseconds, cut off."""


class Deadlines:
    """Who must be heard of until when. Pure; times are of any one clock.

    An update only changes a number: the heap holds one entry per execution, which is put back when it comes up and
    the deadline has moved.
    """

    def __init__(self) -> None:
        self._deadlines: dict[str, float] = {}
        self._heaped: dict[str, float] = {}
        """The time of each execution's entry in the heap; entries with another time are left over."""
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._deadlines)

    def put(self, key: str, at: float) -> bool:
        """Set or move a deadline; returns whether it is the first of all now."""
        self._deadlines[key] = at
        heaped = self._heaped.get(key)
        if heaped is None or at < heaped:
            self._push(key, at)
        return self._heap[0][0] >= at

    def drop(self, key: str) -> None:
        """Forget one."""
        self._deadlines.pop(key, None)
        if len(self._heap) > 2 * len(self._deadlines) + 64:
            self._tidy()

    def due(self, now: float, most: int) -> list[str]:
        """Take those whose deadline has come, earliest first."""
        found: list[str] = []
        while self._heap and self._heap[0][0] <= now and len(found) < most:
            at, key = heapq.heappop(self._heap)
            if self._heaped.get(key) != at:
                continue
            del self._heaped[key]
            deadline = self._deadlines.get(key)
            if deadline is None:
                continue
            if deadline > now:
                self._push(key, deadline)
                continue
            del self._deadlines[key]
            found.append(key)
        return found

    def next(self) -> float | None:
        """When to look again; nobody is due earlier."""
        return self._heap[0][0] if self._heap else None

    def _push(self, key: str, at: float) -> None:
        self._heaped[key] = at
        heapq.heappush(self._heap, (at, key))

    def _tidy(self) -> None:
        """Without those that were dropped: they would stay until their time."""
        self._heaped = dict(self._deadlines)
        self._heap = [(at, key) for key, at in self._deadlines.items()]
        heapq.heapify(self._heap)


class WatchLedger(Protocol):
    """The part of a ledger that the watcher needs."""

    async def watched(self, after: tuple[float, str], most: int) -> list[tuple[str, float]]:
        """See `SqlLedger.watched`."""
        ...

    async def overdue(self, until: float, most: int) -> list[str]:
        """See `SqlLedger.overdue`."""
        ...

    async def fall_silent(self, ids: Sequence[str], now: float) -> Silence:
        """See `SqlLedger.fall_silent`."""
        ...

    async def run_out(self, now: float, most: int) -> Consequences:
        """See `SqlLedger.run_out`."""
        ...

    async def shift_clocks(self, by_s: float) -> int:
        """See `SqlLedger.shift_clocks`."""
        ...


class WatchBus(Protocol):
    """The part of a bus that the watcher needs."""

    @property
    def session(self) -> int:
        """Number of the connection; 0: none."""
        ...


class Watcher:
    """Watches the executions of one ledger.

    Args:
        ledger: what is true.
        bus: where notifications come from.
        follow: does here what follows: stops attempts, starts calls.
        clock: wall and monotonic.
    """

    def __init__(
        self,
        ledger: WatchLedger,
        bus: WatchBus,
        follow: Callable[[Consequences], None],
        clock: Clock | None = None,
    ) -> None:
        self._ledger = ledger
        self._bus = bus
        self._follow = follow
        self._clock = SteadyClock(clock)
        self._deadlines = Deadlines()
        self._wake = asyncio.Event()
        self._session = -1
        """The connection after whose beginning the deadlines were read."""
        self._looked_at = self._clock.monotonic()
        self._is_lagging = False
        self.flagged = 0
        """Executions that it flagged TIMED_OUT."""
        self.on_flagged: Callable[[Sequence[float]], None] | None = None
        """Told how long after their deadlines executions were on disk as TIMED_OUT; None: nobody measures."""

    @property
    def watched(self) -> int:
        """Executions whose silence it waits for."""
        return len(self._deadlines)

    @property
    def lag_s(self) -> float:
        """How late it is now, with its first deadline or with looking through the ledger; it grows while it stands."""
        now = self._clock.monotonic()
        first = self._deadlines.next()
        return max(0.0, now - first if first is not None else 0.0, now - self._looked_at - TICK_S)

    def deliver(self, delivery: Delivery) -> None:
        """Take a notification; called by the bus for each, in order. It needs no acknowledgement."""
        try:
            told = from_json(delivery.body)
            execution_id, deadline = str(told["executionId"]), told.get("updateDeadline")
            at = None if deadline is None else datetime.fromisoformat(deadline).timestamp() + _TOLD_TO_S
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # The ledger is asked in any case: a notification that is none of ours costs nothing but itself.
            log.debug("notification_unreadable", detail=str(error))
            return
        if at is None:
            self._deadlines.drop(execution_id)
        else:
            self._expect(execution_id, at)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await self.turn()
            await self._rest()

    async def turn(self) -> None:
        """Do all that is due now."""
        self._wake.clear()
        await self._mind_clock()
        if self._session != self._bus.session:
            await self._read_all()
        self._tell_lag(await self._flag_due())
        if self._clock.monotonic() >= self._looked_at + TICK_S:
            await self._look()

    # --- waiting -----------------------------------------------------------------------------------------

    async def _rest(self) -> None:
        """Until something is due: a deadline, a look at the ledger; or an earlier deadline came to be known."""
        look_at = self._looked_at + TICK_S
        first = self._deadlines.next()
        until = look_at if first is None else min(look_at, first)
        try:
            async with asyncio.timeout(max(0.0, until - self._clock.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            return

    def _expect(self, execution_id: str, deadline: float) -> None:
        """An update of an execution until an instant of the wall clock."""
        if self._deadlines.put(execution_id, self._clock.until(deadline)):
            self._wake.set()

    async def _read_all(self) -> None:
        """Read every deadline from the ledger: at the start, and when notifications may have been missed."""
        session = self._bus.session
        began = self._clock.monotonic()
        after = (0.0, "")
        overdue = 0
        while page := await self._ledger.watched(after, _PAGE):
            for execution_id, deadline in page:
                self._expect(execution_id, deadline)
            after = (page[-1][1], page[-1][0])
            overdue += len(await self._flag_due())
        self._session = session
        took_s = round(self._clock.monotonic() - began, 3)
        log.info("watching", executions=self.watched, overdue=overdue, read_in_s=took_s)

    async def _mind_clock(self) -> bool:
        """Follow the wall clock; returns whether it was set."""
        by_s = self._clock.look()
        if not by_s:
            return False
        shifted = await self._ledger.shift_clocks(by_s)
        log.warning("clock_set", by_s=round(by_s, 1), consequence=f"{shifted} deadlines are moved by as much")
        await self._read_all()
        return True

    # --- flagging ----------------------------------------------------------------------------------------

    async def _flag_due(self) -> list[float]:
        """Flag whose time has come; returns how late each was flagged, in seconds."""
        lateness_s: list[float] = []
        while due := self._deadlines.due(self._clock.monotonic(), _AT_ONCE):
            lateness_s += await self._flag(due)
        return lateness_s

    async def _flag(self, due: Sequence[str]) -> list[float]:
        if await self._mind_clock():
            return []  # they were read again, with deadlines by the new time
        asked_at = self._clock.monotonic()
        silence = await self._ledger.fall_silent(due, self._clock.now())
        if self.on_flagged is not None and silence.lateness_s:
            took_s = self._clock.monotonic() - asked_at
            self.on_flagged([late_s + took_s for late_s in silence.lateness_s])
        for execution_id, deadline in silence.later.items():
            self._expect(execution_id, deadline)
        self.flagged += len(silence.lateness_s)
        return silence.lateness_s

    async def _look(self) -> None:
        """Look through the ledger for what no timer here knows."""
        more = True
        while more:
            await self._mind_clock()
            missed = await self._ledger.overdue(self._clock.now(), _AT_ONCE)
            if missed:
                await self._flag(missed)
            consequences = await self._ledger.run_out(self._clock.now(), _AT_ONCE)
            self._follow(consequences)
            more = consequences.again or len(missed) == _AT_ONCE
        self._looked_at = self._clock.monotonic()

    def _tell_lag(self, lateness_s: Iterable[float]) -> None:
        worst = max(lateness_s, default=0.0)
        is_lagging = worst > _LAG_S
        if is_lagging and not self._is_lagging:
            log.warning(
                "watcher_lags",
                by_s=round(worst, 3),
                consequence="silent executions are flagged so much later",
            )
        self._is_lagging = is_lagging
