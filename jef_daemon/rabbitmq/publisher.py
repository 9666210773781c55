"""Many publishes in one write, in order, each confirmed by the broker.

Writes to a channel of the library's that is in confirm mode and used by nobody else, and takes its confirmations
where they arrive (`tap`): no object, lock or task switch for a message.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

import aiormq
from aiormq.abc import ChannelFrame

from jef_daemon.ports import MessageRefused, MessageReturned, Outgoing
from jef_daemon.rabbitmq import frames
from jef_daemon.rabbitmq.tap import HEADER, METHOD, Tap

_ACK, _NACK, _RETURN = (struct.pack(">HH", 60, method) for method in (80, 120, 50))
_NUMBER = struct.Struct(">QB")
_MULTIPLE = 1


class _Batch:
    """What was written at once."""

    __slots__ = ("confirmed", "is_returned", "left")

    def __init__(self, size: int, confirmed: asyncio.Future[None]) -> None:
        self.left = size
        self.confirmed = confirmed
        self.is_returned = False
        """Whether the broker has given one back; it confirms that one, too."""

    def settle(self, *, is_taken: bool) -> None:
        """One of them was confirmed, or refused."""
        self.left -= 1
        if self.confirmed.done():
            return
        if not is_taken:
            self.confirmed.set_exception(MessageRefused("the broker refused a message"))
        elif self.left == 0 and self.is_returned:
            self.confirmed.set_exception(MessageReturned("there is no queue for a message"))
        elif self.left == 0:
            self.confirmed.set_result(None)


class Publisher:
    """Publishes on one channel.

    Args:
        tap: of the channel's connection.
        channel: open, in confirm mode, used by nobody else.
        window: most unconfirmed messages; `publish` waits while there are more.
    """

    def __init__(self, tap: Tap, channel: aiormq.Channel, window: int) -> None:
        self._tap = tap
        self._channel = channel
        self._window = window
        self._last = 0
        """The number of the last message: the broker counts them as we do, from 1."""
        self._seen = 0
        """Up to here there is nothing unconfirmed."""
        self._batches: dict[int, _Batch] = {}
        """Of each unconfirmed message, by number."""
        self._turn = asyncio.Lock()
        """Messages are numbered in the order in which they are written, though the library's queue may be full."""
        self._lost = ""
        """Why the channel is gone."""
        self._unconfirmed = 0
        self._room = asyncio.Event()
        self._room.set()
        self._open: set[asyncio.Future[None]] = set()
        self._max_body: int = channel.connection.connection_tune.frame_max - 8
        tap.take(channel.number, self._confirm)

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """Write messages in order.

        Returns:
            Done when all are confirmed; `MessageRefused` when one was refused, `MessageReturned` when there was no
            queue for one that is mandatory, `ConnectionError` when the channel was lost.

        Raises:
            ConnectionError: the channel was lost before anything was written.
        """
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not messages:
            confirmed.set_result(None)  # no confirmation would ever come that could settle it
            return confirmed
        async with self._turn:
            await self._room.wait()
            if self._lost:
                raise ConnectionError(self._lost)
            await self._write(messages, confirmed)
        return confirmed

    async def _write(self, messages: Sequence[Outgoing], confirmed: asyncio.Future[None]) -> None:
        first = self._last + 1
        payload = b"".join(
            frames.publish(
                self._channel.number,
                message.exchange,
                message.routing_key,
                message.body,
                headers=message.headers,
                correlation_id=message.correlation_id,
                reply_to=message.reply_to,
                return_as=str(number) if message.is_mandatory else None,
                max_body=self._max_body,
            )
            for number, message in enumerate(messages, first)
        )
        self._last += len(messages)
        self._batches |= dict.fromkeys(range(first, self._last + 1), _Batch(len(messages), confirmed))
        self._take(len(messages), confirmed)
        queue, frame = self._channel.write_queue, ChannelFrame(payload=payload, should_close=False)
        if not queue.full():
            queue.put_nowait(frame)
            return
        putting = asyncio.ensure_future(queue.put(frame))
        await asyncio.wait({putting, confirmed}, return_when=asyncio.FIRST_COMPLETED)
        putting.cancel()  # where the connection was lost nobody takes anything from the queue any more

    def fail(self, reason: str) -> None:
        """The channel is gone: everything unconfirmed is to be sent again by whoever sent it."""
        self._lost = reason
        self._tap.leave(self._channel.number)
        for confirmed in list(self._open):
            if not confirmed.done():
                confirmed.set_exception(ConnectionError(reason))
        self._room.set()

    @property
    def unconfirmed(self) -> int:
        """Messages on their way."""
        return self._unconfirmed

    def _confirm(self, kind: int, payload: bytes) -> bool:
        """See `tap.Taker`."""
        if kind == HEADER:
            self._note_returned(frames.id_of(payload))
        if kind != METHOD or payload.startswith(_RETURN):
            return True  # nothing else that has a content comes by this channel
        if not payload.startswith((_ACK, _NACK)):
            return False
        is_taken = payload.startswith(_ACK)
        number, bits = _NUMBER.unpack_from(payload, 4)
        if bits & _MULTIPLE:
            for each in range(self._seen + 1, number + 1):
                self._settle(each, is_taken=is_taken)
            self._seen = max(self._seen, number)
        else:
            self._settle(number, is_taken=is_taken)
        return True

    def _note_returned(self, name: str) -> None:
        """The broker gives a message back, before it confirms it."""
        batch = self._batches.get(int(name)) if name.isdecimal() else None
        if batch is not None:
            batch.is_returned = True

    def _settle(self, number: int, *, is_taken: bool) -> None:
        batch = self._batches.pop(number, None)
        if batch is not None:  # else confirmed before by itself
            batch.settle(is_taken=is_taken)

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
