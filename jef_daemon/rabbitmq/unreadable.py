"""Deliveries whose properties the library cannot decode.

RabbitMQ passes on whatever a producer wrote: a correlation id or routing key that is no UTF-8, a timestamp in
nanoseconds. The library (pamqp) refuses such a frame, aiormq gives the connection up for it, and the broker
delivers the same message to the next one: one producer's mistake would stop every job, for ever. So what
cannot be decoded is left out of the message, and the rest of it is read.
"""

from __future__ import annotations

import struct

import pamqp.frame
from pamqp import commands, header
from pamqp.exceptions import UnmarshalingException
from pamqp.frame import FrameTypes

_FRAME = struct.Struct(">BHI")
_METHOD, _HEADER = 1, 2
_CONTENT = struct.Struct(">HHQ")
_LONG_LONG = struct.Struct(">Q")
_DELIVER, _GET_OK = struct.pack(">HH", 60, 60), struct.pack(">HH", 60, 71)

_library = pamqp.frame.unmarshal


def unmarshal(data_in: bytes) -> tuple[int, int, FrameTypes]:
    """A frame as the library reads it, or what can be read of a delivery.

    Returns:
        Bytes used, channel, frame.

    Raises:
        UnmarshalingException: it is broken otherwise.
    """
    try:
        return _library(data_in)
    except (UnmarshalingException, ValueError, ArithmeticError, OSError):
        kind, channel, size = _FRAME.unpack_from(data_in)
        payload = data_in[_FRAME.size : _FRAME.size + size]
        used = _FRAME.size + size + 1
        if kind == _HEADER:
            return used, channel, _bare_header(payload)
        if kind == _METHOD and payload[:4] == _DELIVER:
            return used, channel, _deliver(payload[4:])
        if kind == _METHOD and payload[:4] == _GET_OK:
            return used, channel, _get_ok(payload[4:])
        raise


def install() -> None:
    """Have the client read with `unmarshal`: it offers no other way in."""
    pamqp.frame.unmarshal = unmarshal


def _bare_header(payload: bytes) -> header.ContentHeader:
    _, weight, size = _CONTENT.unpack_from(payload)
    return header.ContentHeader(weight, size, commands.Basic.Properties())


def _deliver(payload: bytes) -> commands.Basic.Deliver:
    tag, rest = _short(payload)
    exchange, rest = _short(rest[9:])
    key, _ = _short(rest)
    number, redelivered = _numbers(payload[1 + payload[0] :])
    # Set one by one: made at once, the library holds names against its own idea of them.
    deliver = commands.Basic.Deliver()
    deliver.consumer_tag, deliver.delivery_tag, deliver.redelivered = tag, number, redelivered
    deliver.exchange, deliver.routing_key = exchange, key
    return deliver


def _get_ok(payload: bytes) -> commands.Basic.GetOk:
    exchange, rest = _short(payload[9:])
    key, rest = _short(rest)
    number, redelivered = _numbers(payload)
    found = commands.Basic.GetOk()
    found.delivery_tag, found.redelivered = number, redelivered
    found.exchange, found.routing_key, found.message_count = exchange, key, int.from_bytes(rest[:4])
    return found


def _numbers(payload: bytes) -> tuple[int, bool]:
    return _LONG_LONG.unpack_from(payload)[0], bool(payload[8] & 1)


def _short(payload: bytes) -> tuple[str, bytes]:
    """A short string; each byte that is no UTF-8 becomes a question mark, so that it never gets longer."""
    end = 1 + payload[0]
    return payload[1:end].decode("utf-8", "replace").replace("\ufffd", "?"), payload[end:]
