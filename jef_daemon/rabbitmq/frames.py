"""Messages as bytes: a publish is packed once, without an object for each of its three frames.

AMQP 0-9-1, section 4.2.3: a frame is type (1), channel (2), size (4), payload, 0xCE. A message is a method
frame (Basic.Publish), a content header and body frames. The library's own marshaller is general; this one
does the single thing we do thousands of times a second. A test compares the two byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pamqp import encode
from pamqp.header import ContentHeader

_END = b"\xce"
_FRAME = struct.Struct(">BHI")
_METHOD, _HEADER, _BODY = 1, 2, 3
_PUBLISH = struct.pack(">HHH", 60, 40, 0)
_CONTENT = struct.Struct(">HHQH")
_BASIC = 60
# Bits of the property flags, in the order in which the properties are written.
_HAS_TYPE, _HAS_HEADERS, _HAS_MODE, _HAS_CORRELATION, _HAS_REPLY = 1 << 15, 1 << 13, 1 << 12, 1 << 10, 1 << 9
_HAS_ID = 1 << 7
_JSON = b"\x10application/json"
_PERSISTENT = b"\x02"


def publish(
    channel: int,
    exchange: str,
    routing_key: str,
    body: bytes,
    *,
    headers: Mapping[str, Any] | None = None,
    correlation_id: str | None = None,
    reply_to: str | None = None,
    return_as: str | None = None,
    max_body: int = 131_064,
) -> bytes:
    """A persistent JSON message, ready to be written.

    Args:
        channel: the channel's number.
        exchange: at most 255 bytes.
        routing_key: at most 255 bytes.
        body: the message.
        headers: AMQP table.
        correlation_id: at most 255 bytes.
        reply_to: at most 255 bytes.
        return_as: it is mandatory, and has this id where the broker gives it back.
        max_body: most bytes of one body frame (the connection's frame_max less 8).

    Raises:
        ValueError: a name is longer than AMQP allows.
    """
    flags = _HAS_TYPE | _HAS_MODE
    properties = _JSON + _PERSISTENT
    if headers or correlation_id or reply_to or return_as:
        parts = [_JSON]
        if headers:
            flags |= _HAS_HEADERS
            parts.append(encode.field_table(dict(headers)))
        parts.append(_PERSISTENT)
        if correlation_id:
            flags |= _HAS_CORRELATION
            parts.append(_short(correlation_id))
        if reply_to:
            flags |= _HAS_REPLY
            parts.append(_short(reply_to))
        if return_as:
            flags |= _HAS_ID
            parts.append(_short(return_as))
        properties = b"".join(parts)
    size = len(body)
    header = _CONTENT.pack(_BASIC, 0, size, flags) + properties
    frames = [
        _method(channel, exchange, routing_key, b"\x01" if return_as else b"\x00"),
        _FRAME.pack(_HEADER, channel, len(header)),
        header,
        _END,
    ]
    for start in range(0, size, max_body):
        piece = body[start : start + max_body]
        frames += (_FRAME.pack(_BODY, channel, len(piece)), piece, _END)
    return b"".join(frames)


@lru_cache(maxsize=4096)
def _method(channel: int, exchange: str, routing_key: str, bits: bytes) -> bytes:
    payload = _PUBLISH + _short(exchange) + _short(routing_key) + bits
    return _FRAME.pack(_METHOD, channel, len(payload)) + payload + _END


def id_of(payload: bytes) -> str:
    """What a message is called, by the payload of its content header."""
    header = ContentHeader()
    header.unmarshal(payload)
    return str(header.properties.message_id or "")


def _short(value: str) -> bytes:
    encoded = value.encode()
    if len(encoded) > 255:
        raise ValueError(f"{value[:40]!r}… has {len(encoded)} bytes; AMQP allows 255")
    return bytes((len(encoded),)) + encoded
