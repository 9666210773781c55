"""Deliveries of one source, taken in batches: all that are there, never waiting for more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from jef_daemon.ports import Delivery


class Inbox:
    """Collects deliveries until whoever takes them is ready.

    Args:
        take: called with each batch, in order; it acknowledges.
        at_once: most deliveries of a batch.
    """

    def __init__(self, take: Callable[[Sequence[Delivery]], Awaitable[None]], at_once: int = 500) -> None:
        self._take = take
        self._at_once = at_once
        self._waiting: list[Delivery] = []
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def deliver(self, delivery: Delivery) -> None:
        """Take a delivery; called by the bus for each, in order."""
        self._waiting.append(delivery)
        self._idle.clear()
        self._arrived.set()

    async def run(self) -> None:
        """Hand batches over until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                batch, self._waiting = self._waiting[: self._at_once], self._waiting[self._at_once :]
                await self._take(batch)
            self._idle.set()

    async def finish(self) -> None:
        """Wait until everything delivered is taken."""
        await self._idle.wait()
