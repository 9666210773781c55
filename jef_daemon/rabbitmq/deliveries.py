"""Deliveries as they come off the wire: three frames or more → one `Delivery`.

AMQP 0-9-1: a Basic.Deliver, a content header, body frames until all of the body is there; nothing comes between them
on their channel. Of the properties, those are read that we use, and a message whose properties cannot be read has
none: see `unreadable`, which does as much for the library.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from pamqp import decode

from jef_daemon.ports import Delivery
from jef_daemon.rabbitmq.tap import BODY, HEADER, METHOD

_DELIVER = struct.pack(">HH", 60, 60)
_NUMBER = struct.Struct(">QB")
_CONTENT = struct.Struct(">QH")
_TYPE, _ENCODING, _HEADERS, _MODE, _PRIORITY = 1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11
_CORRELATION, _REPLY = 1 << 10, 1 << 9

Properties = tuple[Mapping[str, Any], str | None, str | None]
"""Headers, `reply_to`, `correlation_id`."""


class Deliveries:
    """Puts the deliveries of one channel together (`tap.Taker`).

    Args:
        session: number of the connection.
        take: called for each, in order.
    """

    def __init__(self, session: int, take: Callable[[Delivery], object]) -> None:
        self._session = session
        self._take = take
        self._sources: dict[bytes, str] = {}
        self._deliver: tuple[str, int, bool, str] | None = None
        """Of the delivery whose content is coming: source, tag, whether redelivered, routing key."""
        self._properties: Properties = ({}, None, None)
        self._pieces: list[bytes] = []
        self._missing = 0

    def expect(self, consumer_tag: str, source: str) -> None:
        """Say from which source a consumer's deliveries are."""
        self._sources[consumer_tag.encode()] = source

    def __call__(self, kind: int, payload: bytes) -> bool:
        """See `tap.Taker`."""
        if kind == METHOD:
            if not payload.startswith(_DELIVER):
                return False
            self._deliver = self._begun(payload)
            return True
        if self._deliver is None:
            return False
        if kind == HEADER:
            self._missing, flags = _CONTENT.unpack_from(payload, 4)
            self._properties = properties(flags, payload)
        elif kind == BODY:
            self._pieces.append(payload)
            self._missing -= len(payload)
        if self._missing <= 0:
            self._end(*self._deliver)
        return True

    def _begun(self, payload: bytes) -> tuple[str, int, bool, str]:
        at = 5 + payload[4]
        source = self._sources[payload[5:at]]
        number, bits = _NUMBER.unpack_from(payload, at)
        at += _NUMBER.size
        at += 1 + payload[at]  # the exchange
        return source, number, bool(bits & 1), text(payload[at + 1 : at + 1 + payload[at]])

    def _end(self, source: str, number: int, redelivered: bool, routing_key: str) -> None:
        pieces, self._pieces, self._deliver = self._pieces, [], None
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        headers, reply_to, correlation_id = self._properties
        self._take(
            Delivery(
                source,
                body,
                number,
                self._session,
                redelivered,
                routing_key,
                headers,
                reply_to,
                correlation_id,
            )
        )


def properties(flags: int, payload: bytes) -> Properties:
    """What we use of a content header's properties.

    Args:
        flags: which there are.
        payload: of the frame; they begin at its 14th byte, in the order of their flags.
    """
    try:
        at = 14
        for flag in (_TYPE, _ENCODING):
            if flags & flag:
                at += 1 + payload[at]
        headers: Mapping[str, Any] = {}
        if flags & _HEADERS:
            used, headers = decode.field_table(payload[at:])
            at += used
        at += bool(flags & _MODE) + bool(flags & _PRIORITY)
        reply_to = correlation_id = None
        if flags & _CORRELATION:
            correlation_id = payload[at + 1 : at + 1 + payload[at]].decode()
            at += 1 + payload[at]
        if flags & _REPLY:
            reply_to = payload[at + 1 : at + 1 + payload[at]].decode()
    except (ValueError, IndexError, ArithmeticError, OSError):  # no UTF-8; cut short; beyond the calendar
        return {}, None, None
    return headers, reply_to, correlation_id


def text(found: bytes) -> str:
    """A short string; each byte that is no UTF-8 becomes a question mark, so that it never gets longer."""
    return found.decode("utf-8", "replace").replace("\ufffd", "?")
