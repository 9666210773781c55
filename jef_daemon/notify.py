"""Outbox → confirmed, ordered notifications. What is recorded is told, at least once, in order.

Messages come straight from each commit; only what did not fit, and what an earlier life left, is read from
the ledger. Many are on their way at once; a message leaves the outbox when the broker has confirmed it.
When the connection is lost, everything unconfirmed is sent again, in order: readers drop what they have
seen by (executionId, sequence).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Protocol

import structlog

from jef_daemon.errors import LedgerUnavailable
from jef_daemon.ports import MessageRefused, Outgoing

log = structlog.get_logger()

_AT_ONCE = 500
"""Messages in one write."""
_IN_MEMORY = 10_000
"""Messages kept ready; the rest wait in the ledger."""
_PAUSE_S = 0.1
"""After a loss: a broker that refuses everything is not asked in a tight loop."""


class Outbox(Protocol):
    """The part of a ledger that notify needs."""

    async def outbox(self, after: int, limit: int) -> list[Outgoing]:
        """See `ports.Ledger`."""
        ...

    async def confirm(self, ids: Sequence[int]) -> None:
        """See `ports.Ledger`."""
        ...


class Sender(Protocol):
    """The part of a bus that notify needs."""

    async def publish(self, messages: Sequence[Outgoing]) -> Awaitable[None]:
        """See `ports.Bus`."""
        ...


class Notifier:
    """Publishes the outbox.

    Args:
        ledger: what is to be told.
        bus: where to.
        on_told: is handed each batch that the broker has confirmed; None: nobody asks.
    """

    def __init__(
        self, ledger: Outbox, bus: Sender, on_told: Callable[[Sequence[Outgoing]], None] | None = None
    ) -> None:
        self._on_told = on_told
        self._ledger = ledger
        self._bus = bus
        self._ready: deque[Outgoing] = deque()
        self._sent_up_to = 0
        self._committed_up_to = 0
        self._read_up_to = 0
        self._behind = True  # an earlier life may have left something
        self._unconfirmed = 0
        self._lost = False
        """Something is to be sent again."""
        self._cut_off = False
        """It was lost with its connection."""
        self._changed = asyncio.Event()
        self._changed.set()
        self._empty = asyncio.Event()
        self._confirming: set[asyncio.Task[None]] = set()
        self.on_confirmed: Callable[[float], None] | None = None
        """Told how many seconds the broker took to confirm what was handed to it; None: nobody measures."""

    def put(self, messages: list[Outgoing]) -> None:
        """Take the messages of a commit, in order."""
        self._committed_up_to = messages[-1].id
        if self._behind or len(self._ready) > _IN_MEMORY:
            self._behind = True
        else:
            # A page read just now may have shown them before their commit was handed over.
            self._ready.extend(message for message in messages if message.id > self._read_up_to)
        self._empty.clear()
        self._changed.set()

    @property
    def depth(self) -> int:
        """Messages in memory that are not confirmed yet."""
        return len(self._ready) + self._unconfirmed

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._lost:
                await self._start_over()
            # What comes behind does not go by a new connection before what was lost with the old one: readers would
            # take the earlier for old. It goes before what a full queue refuses, which may be for ever.
            while (self._ready or self._behind) and not self._cut_off:
                if not self._ready:
                    await self._read_on()
                    continue
                if not await self._send():
                    break
            self._note_empty()

    async def flush(self) -> bool:
        """Wait until everything is confirmed."""
        return await self._empty.wait()

    async def _send(self) -> bool:
        batch = [self._ready.popleft() for _ in range(min(_AT_ONCE, len(self._ready)))]
        try:
            confirmed = await self._bus.publish(batch)
        except ConnectionError:
            self._lost = True
            self._changed.set()
            return False
        handed_at = monotonic()
        self._sent_up_to = batch[-1].id
        self._unconfirmed += len(batch)
        task = asyncio.create_task(self._confirm(batch, confirmed, handed_at), name="confirm")
        self._confirming.add(task)
        task.add_done_callback(self._confirming.discard)
        return True

    async def _confirm(self, batch: list[Outgoing], confirmed: Awaitable[None], handed_at: float) -> None:
        try:
            await confirmed
        except ConnectionError as error:
            if not self._lost:
                log.info("publishing_again", reason=str(error))
            self._lost = True
            self._cut_off |= not isinstance(error, MessageRefused)
        else:
            if self.on_confirmed is not None:
                self.on_confirmed(monotonic() - handed_at)
            if self._on_told is not None:
                self._on_told(batch)
            # Closed without having taken writes again: told once more after the next start.
            with contextlib.suppress(LedgerUnavailable):
                await self._ledger.confirm([message.id for message in batch])
        finally:
            self._unconfirmed -= len(batch)
            self._changed.set()
            self._note_empty()

    async def _start_over(self) -> None:
        """After a lost connection: wait for what is still open to be settled, then read everything again."""
        if self._confirming:
            await asyncio.wait(set(self._confirming))
        await asyncio.sleep(_PAUSE_S)
        self._lost = self._cut_off = False
        self._ready.clear()
        self._sent_up_to = 0
        self._behind = True

    async def _read_on(self) -> None:
        committed = self._committed_up_to
        found = await self._ledger.outbox(self._sent_up_to, _AT_ONCE)
        self._ready.extend(found)
        if found:
            self._read_up_to = found[-1].id
        # A commit while we read may be missing from what we read: then it is read next time.
        if len(found) < _AT_ONCE and committed == self._committed_up_to:
            self._behind = False

    def _note_empty(self) -> None:
        if not (self._ready or self._behind or self._unconfirmed or self._lost):
            self._empty.set()
