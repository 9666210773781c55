"""Deliveries of one source, taken in batches: all that are there, never waiting for more.

One that cannot be taken by a fault of ours, whichever that is, must not end the daemon: it would come again, and end
the next one, with all jobs that run there. So a batch that fails is taken one by one, and what fails alone is left out.

If many in a row fail, it is rather us than them: they are tried slowly from then on, so that a queue full of good
messages is not a queue of dead letters before anybody has looked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from jef_daemon.errors import Fate, JefError, RequestRefused
from jef_daemon.ports import Delivery

log = structlog.get_logger()

_IN_A_ROW = 20
"""So many may be at fault one after another."""
_PAUSE_S = 5.0
"""Before each of those that come behind them, until one is taken."""


class Inbox:
    """Collects deliveries until whoever takes them is ready.

    Args:
        take: called with each batch, in order; it acknowledges.
        leave_out: told of a delivery that failed alone, and why; it acknowledges.
        at_once: most deliveries of a batch.
    """

    def __init__(
        self,
        take: Callable[[Sequence[Delivery]], Awaitable[None]],
        leave_out: Callable[[Delivery, RequestRefused], Awaitable[None]],
        at_once: int = 500,
    ) -> None:
        self._take = take
        self._leave_out = leave_out
        self._at_once = at_once
        self._waiting: list[Delivery] = []
        self._failed = 0
        """So many were left out since one was taken."""
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
                await self._hand_over(batch)
            self._idle.set()

    async def finish(self) -> None:
        """Wait until everything delivered is taken."""
        await self._idle.wait()

    async def _hand_over(self, batch: Sequence[Delivery]) -> None:
        if self._failed >= _IN_A_ROW:
            await asyncio.sleep(_PAUSE_S)
        try:
            await self._take(batch)
        except Exception as error:  # whichever fault it is, it is to end nothing but this message
            if _concerns_all(error):
                raise
            if len(batch) == 1:
                return await self._give_up(batch[0], error)
            for each in batch:
                await self._hand_over([each])
        else:
            self._failed = 0
        return None

    async def _give_up(self, delivery: Delivery, error: Exception) -> None:
        self._failed += 1
        log.error("message_failed", queue=delivery.source, exc_info=error, consequence="it is left out")
        if self._failed == _IN_A_ROW:
            rate = f"one of them is tried every {_PAUSE_S:g} s until one is taken"
            log.critical("messages_failing", queue=delivery.source, in_a_row=_IN_A_ROW, consequence=rate)
        why = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        # As it can be sent: what is wrong may be half a character.
        said = f"to take it failed, by a fault of the daemon: {why}".encode("utf-8", "replace").decode()
        await self._leave_out(delivery, RequestRefused("message-failed", said))


def _concerns_all(error: Exception) -> bool:
    """Whether it is the ledger, the broker or the machine, and no message's fault."""
    is_ours = isinstance(error, JefError) and error.fate is Fate.REQUEUE
    return is_ours or isinstance(error, OSError | MemoryError)
