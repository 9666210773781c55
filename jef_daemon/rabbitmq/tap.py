"""What comes most often is taken out of the stream where it arrives: deliveries and confirmations.

The library reads a frame at a time, by four awaits, an object for each frame and two tasks for each delivery: for a
job that does nothing that was more than half of all the daemon's work. So the socket's reader looks at the frames of
a read first and hands those over that somebody takes; all others go on to the library, which goes on doing
everything else: connecting, TLS, logging in, channels, declarations, heartbeats, closing.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import aio_pika
from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError
from yarl import URL

Taker = Callable[[int, bytes], bool]
"""Is shown the type and payload of each frame of its channel; returns whether it has taken it."""

METHOD, HEADER, BODY = 1, 2, 3
_HEARTBEAT = b"\x08\0\0\0\0\0\0\xce"
_KINDS = frozenset({METHOD, HEADER, BODY, 8})
_FRAME = struct.Struct(">BHI")
_END = 0xCE
_LONGEST = 2**27
"""Longer ones RabbitMQ does not send: what looks like one is no AMQP."""
_ALIVE_S = 1.0
"""How often the library hears that the broker lives, while all that comes is taken."""
_LIMIT = 2**16


class Tap(asyncio.StreamReader):
    """What the library reads from, without the frames that were taken.

    A stream that is no AMQP 0-9-1 goes through as it is: what is wrong with it, the library says.
    """

    def __init__(self) -> None:
        self._loop_time = asyncio.get_running_loop().time
        super().__init__(limit=_LIMIT, loop=asyncio.get_running_loop())
        self._takers: dict[int, Taker] = {}
        self._rest = b""
        """The beginning of a frame whose end is still to come."""
        self._is_foreign = False
        self._told_alive_at = 0.0

    def take(self, channel: int, taker: Taker) -> None:
        """Show the frames of a channel to somebody, from now on."""
        self._takers[channel] = taker

    def leave(self, channel: int) -> None:
        """Let the library have all of a channel again."""
        self._takers.pop(channel, None)

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # all that an event loop hands over
        """Take a read of the socket; called by the event loop's protocol."""
        stream = self._rest + data if self._rest else data
        passed = at = 0  # up to where the library has it; up to where it was looked at
        size = len(stream)
        while not self._is_foreign and size - at >= _FRAME.size:
            kind, channel, length = _FRAME.unpack_from(stream, at)
            end = at + _FRAME.size + length + 1
            if kind not in _KINDS or length > _LONGEST or (end <= size and stream[end - 1] != _END):
                self._is_foreign = True
                break
            if end > size:
                break
            taker = self._takers.get(channel)
            if taker is not None and taker(kind, stream[at + _FRAME.size : end - 1]):
                self._pass(stream[passed:at])
                passed = end
            at = end
        if self._is_foreign:
            at = size
        self._pass(stream[passed:at])
        self._rest = stream[at:]
        if passed:
            self._tell_alive()

    def feed_eof(self) -> None:
        """The connection has ended, maybe in the middle of a frame."""
        self._pass(self._rest)
        self._rest = b""
        super().feed_eof()

    def _pass(self, frames: bytes) -> None:
        if frames:
            super().feed_data(frames)

    def _tell_alive(self) -> None:
        # The library takes a connection for dead on which it sees nothing for a while, and the broker sends no
        # heartbeats as long as it has anything else to send.
        now = self._loop_time()
        if now - self._told_alive_at >= _ALIVE_S:
            self._told_alive_at = now
            super().feed_data(_HEARTBEAT)


class TappedConnection(aio_pika.Connection):
    """A connection of the library's, read through a tap."""

    def __init__(self, url: URL, **options: Any) -> None:
        super().__init__(url, **options)
        self.tap = Tap()
        self.kwargs["transport_factory"] = _Transport(self.tap)


class _Transport(TransportFactory):
    """TCP or TLS, as the URL says."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect; see the library's own factories."""
        provider = options.pop("ssl_context_provider")
        tls = await provider.get_context() if url.scheme == "amqps" else None
        if url.host is None or url.port is None:
            raise AMQPConnectionError(f"{url} names no host")
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(self._tap, loop=loop)
        try:
            transport, _ = await loop.create_connection(
                lambda: protocol, url.host, url.port, ssl=tls, **options
            )
        except OSError as error:
            raise AMQPConnectionError(*error.args) from error
        return self._tap, asyncio.StreamWriter(transport, protocol, self._tap, loop)
