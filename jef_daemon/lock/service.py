"""ROLE: the lock service, the one consumer of `jef.locks`. Requests → decisions, one transaction for all there are.

Everybody negotiates here: this daemon's own jobs, other daemons, the command line, any AMQP client. What is
decided and what is answered is one transaction, so the service may die at any moment: its successor finds every
lock, waiter and fencing number, and what was not answered is delivered again and answered the same.

While it is away nobody can renew: whenever it comes back, to a broker or from the dead, no lease ends before a
time of grace is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from jef_daemon.clock import SteadyClock
from jef_daemon.errors import RequestRefused
from jef_daemon.inbox import Inbox
from jef_daemon.lock import wire
from jef_daemon.lock.requests import Answer, Expire, Refused, Reply, Request
from jef_daemon.ports import Accepted, Arrival, Clock, Delivery, Outgoing, Refusal, seen

log = structlog.get_logger()

_TICK_S = 1.0
"""How late a lease ends."""
_AT_ONCE = 250
"""Requests in one transaction: what is decided together is answered together."""


class LockLedger(Protocol):
    """The part of a ledger that the service needs."""

    def deciding(self, requests: Sequence[Request], now: float | None) -> asyncio.Future[set[str]]:
        """See `SqlLedger.deciding`."""
        ...

    def accepting(self, messages: Sequence[Arrival | Refusal]) -> asyncio.Future[list[Accepted]]:
        """`accept` of `ports.Ledger`, put in at once."""
        ...

    async def take_over_locks(self, grace_s: float) -> None:
        """See `SqlLedger.take_over_locks`."""
        ...

    async def shift_locks(self, by_s: float) -> None:
        """See `SqlLedger.shift_locks`."""
        ...

    async def tell_places(self, resources: Sequence[str], listeners: str, most: int) -> None:
        """See `SqlLedger.tell_places`."""
        ...


class LockBus(Protocol):
    """The part of a bus that the service needs."""

    @property
    def session(self) -> int:
        """Number of the connection; 0: none."""
        ...

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `ports.Bus`."""
        ...

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """See `ports.Bus`."""
        ...


class LockService:
    """Serves locks.

    Args:
        ledger: where they are kept.
        bus: where requests come from.
        listeners: what the queues begin with whose owners hear when their place changes.
        max_body_bytes: longest request.
        takeover_grace_s: no lease ends so soon after the service came back.
        tell_places_every_s: how often places are told.
        tell_places_to: how many of each queue hear theirs.
        clock: to see that the wall clock was set.
    """

    def __init__(
        self,
        ledger: LockLedger,
        bus: LockBus,
        listeners: str,
        *,
        max_body_bytes: int = 1024 * 1024,
        takeover_grace_s: float = 30.0,
        tell_places_every_s: float = 5.0,
        tell_places_to: int = 20,
        clock: Clock | None = None,
    ) -> None:
        self._ledger = ledger
        self._bus = bus
        self._listeners = listeners
        self.max_body_bytes = max_body_bytes
        """Longest request."""
        self.takeover_grace_s = takeover_grace_s
        """No lease ends so soon after the service came back."""
        self.tell_places_every_s = tell_places_every_s
        """How often places are told."""
        self.tell_places_to = tell_places_to
        """How many of each queue hear theirs."""
        self._clock = SteadyClock(clock)
        self._inbox = Inbox(self._take, self._leave_out, _AT_ONCE)
        self._session = 0
        """The connection for which leases were prolonged."""
        self._touched: set[str] = set()
        self._turn = asyncio.Lock()

    def deliver(self, delivery: Delivery) -> None:
        """Take a request; called by the bus for each, in order."""
        self._inbox.deliver(delivery)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._inbox.run(), name="locks: requests")
            parts.create_task(self._end_leases(), name="locks: leases")
            parts.create_task(self._tell_places(), name="locks: places")

    async def finish(self) -> None:
        """Wait until everything delivered is decided and acknowledged."""
        await self._inbox.finish()

    # --- requests ----------------------------------------------------------------------------------------

    async def _take(self, batch: Sequence[Delivery]) -> None:
        requests: list[Request] = []
        refusals: list[Refusal] = []
        for delivery in batch:
            try:
                requests.append(self._read(delivery))
            except RequestRefused as error:
                refusals.append(Refusal(error, delivery, "locks"))
        if requests:
            self._touched |= await self._decided(requests, batch[-1].session)
        if refusals:  # behind what may fail: then all come again, one by one, and nobody is to be told twice
            await self._refuse(refusals)
        await self._bus.acknowledge(batch)

    def _read(self, delivery: Delivery) -> Request:
        return wire.decode(delivery.body, self.max_body_bytes, delivery.reply_to, delivery.correlation_id)

    async def _leave_out(self, delivery: Delivery, error: RequestRefused) -> None:
        await self._refuse([Refusal(error, delivery, "locks")])
        await self._bus.acknowledge([delivery])

    async def _refuse(self, refusals: Sequence[Refusal]) -> None:
        """Kept as dead letters; whoever waits for an answer gets one."""
        await self._ledger.accepting(refusals)
        for refusal in refusals:
            delivery, error = refusal.delivery, refusal.error
            log.warning("lock_request_refused", reason=error.code, detail=error.detail)
            if delivery.reply_to:
                reply = Reply(
                    Answer.REFUSED,
                    "",
                    delivery.reply_to,
                    delivery.correlation_id,
                    reason=f"{error.code}: {error.detail}",
                    code=Refused.MALFORMED,
                )
                await self._answer(reply)

    async def _answer(self, reply: Reply) -> None:
        body = wire.encode(reply)
        try:
            seen(
                await self._bus.publish(
                    [Outgoing(0, "", reply.reply_to or "", body, None, reply.correlation_id)]
                )
            )
        except ConnectionError as error:
            log.debug("lock_answer_lost", reason=str(error))

    # --- time --------------------------------------------------------------------------------------------

    async def _decided(self, requests: Sequence[Request], session: int) -> set[str]:
        """Decide by leases that are as the clock and the connection want them; returns whose queue moved.

        Nobody decides while leases are moved: a transaction decides first and moves last, whatever was put in first.
        """
        async with self._turn:
            await self._take_over(session)
            deciding = self._ledger.deciding(requests, self._clock.now())
        return await deciding

    async def _take_over(self, session: int) -> None:
        """Prolong leases once for each connection, and when the wall clock was set."""
        by_s = self._clock.look()
        if session == self._session and not by_s:
            return
        self._session = session
        if by_s:
            log.warning("clock_set", by_s=round(by_s, 1), consequence="leases last as long as before")
            await self._ledger.shift_locks(by_s)
        # A suspended machine looks like a clock that was set, and nobody could renew meanwhile.
        await self._ledger.take_over_locks(self.takeover_grace_s)

    async def _end_leases(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if session := self._bus.session:
                self._touched |= await self._decided([Expire()], session)

    async def _tell_places(self) -> None:
        while True:
            await asyncio.sleep(self.tell_places_every_s)
            touched, self._touched = self._touched, set()
            if touched and self.tell_places_to:
                await self._ledger.tell_places(sorted(touched), self._listeners, self.tell_places_to)
