"""Many publishes in one write, in order, each confirmed by the broker.

Builds on an aiormq channel in confirm mode and keeps its bookkeeping true (`delivery_tag`,
`confirmations`), so that other users of the channel and its reader go on working; what it leaves out is
the object building, the locks and the task switches per message. A contract test holds it against the
library.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiormq
from aiormq.abc import ChannelFrame

from jef_daemon.ports import Outgoing
from jef_daemon.rabbitmq import frames


class _Batch:
    """Stands in for the futures that the channel's reader settles, one object for a whole batch."""

    __slots__ = ("_left", "confirmed")

    def __init__(self, size: int, confirmed: asyncio.Future[None]) -> None:
        self._left = size
        self.confirmed = confirmed

    def done(self) -> bool:
        return False

    def set_result(self, frame: object) -> None:
        self._left -= 1
        if self._left == 0 and not self.confirmed.done():
            self.confirmed.set_result(None)

    def set_exception(self, error: BaseException) -> None:
        if not self.confirmed.done():
            self.confirmed.set_exception(ConnectionError(f"the broker refused a message: {error}"))

    def cancel(self) -> None:
        self.set_exception(ConnectionError("the channel was closed"))


class Publisher:
    """Publishes on one channel.

    Args:
        channel: open, in confirm mode, used by nobody else.
        window: most unconfirmed messages; `publish` waits while there are more.
    """

    def __init__(self, channel: aiormq.Channel, window: int) -> None:
        self._channel = channel
        self._window = window
        self._unconfirmed = 0
        self._room = asyncio.Event()
        self._room.set()
        self._open: set[asyncio.Future[None]] = set()
        self._max_body: int = channel.connection.connection_tune.frame_max - 8

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """Write messages in order.

        Returns:
            Done when all are confirmed; `ConnectionError` when one was refused or the channel was lost.
        """
        await self._room.wait()
        channel = self._channel
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not messages:
            confirmed.set_result(None)  # no confirmation would ever come that could settle it
            return confirmed
        batch = _Batch(len(messages), confirmed)
        payload = b"".join(
            frames.publish(
                channel.number,
                message.exchange,
                message.routing_key,
                message.body,
                headers=message.headers,
                correlation_id=message.correlation_id,
                reply_to=message.reply_to,
                max_body=self._max_body,
            )
            for message in messages
        )
        first = channel.delivery_tag + 1
        channel.delivery_tag += len(messages)
        for tag in range(first, channel.delivery_tag + 1):
            channel.confirmations[tag] = batch  # type: ignore[assignment]  # all that the reader does with a future, it does
        self._take(len(messages), confirmed)
        await channel.write_queue.put(ChannelFrame(payload=payload, should_close=False))
        return confirmed

    def fail(self, reason: str) -> None:
        """The channel is gone: everything unconfirmed is to be sent again by whoever sent it."""
        for confirmed in list(self._open):
            if not confirmed.done():
                confirmed.set_exception(ConnectionError(reason))
        self._room.set()

    @property
    def unconfirmed(self) -> int:
        """Messages on their way."""
        return self._unconfirmed

    def _take(self, count: int, confirmed: asyncio.Future[None]) -> None:
        self._unconfirmed += count
        if self._unconfirmed >= self._window:
            self._room.clear()
        self._open.add(confirmed)

        def give(future: asyncio.Future[None]) -> None:
            self._open.discard(future)
            self._unconfirmed -= count
            if self._unconfirmed < self._window:
                self._room.set()
            if not future.cancelled():
                future.exception()  # seen; whoever awaits it gets it too

        confirmed.add_done_callback(give)
