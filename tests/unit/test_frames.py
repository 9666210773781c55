"""Frames packed by hand, read by the library: what arrives is what was meant."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import body as bodies
from pamqp import commands, frame, header

from jef_daemon.rabbitmq import frames

OVERHEAD = 8
"""Bytes of a frame beside its payload."""


def short(least: int = 0, most: int = 255) -> st.SearchStrategy[str]:
    """Texts of at most 255 bytes."""
    characters = st.characters(exclude_categories=["Cs"])
    return st.text(characters, min_size=least).filter(lambda text: len(text.encode()) <= most)


KEYS = short(1, 128)
"""AMQP 0-9-1, section 4.2.5.5: names of fields have at most 128 characters; the library cuts off the rest."""

values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def unpacked(data: bytes) -> tuple[list[tuple[int, int, Any]], list[int]]:
    """Channel, size and what it is, of each frame."""
    found, sizes = [], []
    while data:
        size, channel, what = frame.unmarshal(data)
        found.append((channel, size, what))
        sizes.append(size)
        data = data[size:]
    return found, sizes


def read(data: bytes, frame_max: int) -> tuple[commands.Basic.Publish, header.ContentHeader, bytes, int]:
    """A message as a broker reads it."""
    found, sizes = unpacked(data)
    assert max(sizes) <= frame_max
    channels = {channel for channel, _, _ in found}
    (_, _, method), (_, _, head), *rest = found
    assert isinstance(method, commands.Basic.Publish)
    assert isinstance(head, header.ContentHeader)
    pieces = [piece for _, _, piece in rest]
    assert all(isinstance(piece, bodies.ContentBody) and piece.value for piece in pieces)
    content = b"".join(piece.value for piece in pieces)
    assert head.body_size == len(content)
    (channel,) = channels
    return method, head, content, channel


@given(
    channel=st.integers(1, 65_535),
    exchange=short(),
    routing_key=short(),
    body=st.binary(max_size=500),
    headers=st.none() | st.dictionaries(KEYS, values, max_size=4),
    correlation_id=st.none() | short(1),
    reply_to=st.none() | short(1),
    return_as=st.none() | short(1),
)
def test_a_message_arrives_as_it_was_meant(
    channel: int,
    exchange: str,
    routing_key: str,
    body: bytes,
    headers: dict[str, Any] | None,
    correlation_id: str | None,
    reply_to: str | None,
    return_as: str | None,
) -> None:
    """Persistent, JSON, and every property where it belongs."""
    data = frames.publish(
        channel,
        exchange,
        routing_key,
        body,
        headers=headers,
        correlation_id=correlation_id,
        reply_to=reply_to,
        return_as=return_as,
    )
    method, head, content, on = read(data, 2**20)
    assert (on, method.exchange, method.routing_key) == (channel, exchange, routing_key)
    assert (method.mandatory, method.immediate, content) == (bool(return_as), False, body)
    told = {name: value for name, value in dict(head.properties).items() if value}
    meant: dict[str, Any] = {"content_type": "application/json", "delivery_mode": 2}
    meant |= {"headers": headers} if headers else {}
    meant |= {"correlation_id": correlation_id} if correlation_id else {}
    meant |= {"reply_to": reply_to} if reply_to else {}
    meant |= {"message_id": return_as} if return_as else {}
    assert told == meant


@given(
    body=st.binary(max_size=4),
    headers=st.none() | st.just({"traceparent": "00-1-2-01", "x-jef-attempt": 3}),
    correlation_id=st.none() | st.just("c"),
    reply_to=st.none() | st.just("q"),
)
def test_the_library_would_write_the_same_bytes(
    body: bytes, headers: dict[str, Any] | None, correlation_id: str | None, reply_to: str | None
) -> None:
    """Byte for byte."""
    properties = commands.Basic.Properties(
        content_type="application/json",
        headers=headers,
        delivery_mode=2,
        correlation_id=correlation_id,
        reply_to=reply_to,
    )
    theirs = frame.marshal(commands.Basic.Publish(exchange="jef.status", routing_key="a.queued"), 1)
    theirs += frame.marshal(header.ContentHeader(0, len(body), properties), 1)
    theirs += frame.marshal(bodies.ContentBody(body), 1) if body else b""
    ours = frames.publish(
        1,
        "jef.status",
        "a.queued",
        body,
        headers=headers,
        correlation_id=correlation_id,
        reply_to=reply_to,
    )
    assert ours == theirs


@given(frame_max=st.integers(4096, 5000), frames_=st.integers(0, 3), beside=st.integers(-2, 2))
@example(131_072, 1, 0)
@example(131_072, 1, 1)
def test_bodies_are_cut_at_the_frame_max(frame_max: int, frames_: int, beside: int) -> None:
    """No frame is longer than agreed, none is empty, nothing is lost at a seam."""
    room = frame_max - OVERHEAD
    body = bytes(number % 251 for number in range(max(0, frames_ * room + beside)))
    data = frames.publish(1, "x", "k", body, max_body=room)
    _, _, content, _ = read(data, frame_max)
    assert content == body
    assert len(unpacked(data)[0]) == 2 + -(-len(body) // room)


def test_the_default_fits_rabbitmqs_frame_max() -> None:
    data = frames.publish(1, "x", "k", b"x" * 300_000)
    assert read(data, 131_072)[2] == b"x" * 300_000


def test_messages_follow_one_another() -> None:
    """A batch is one write."""
    both = frames.publish(1, "x", "a", b"1") + frames.publish(1, "x", "b", b"")
    assert [type(what).__name__ for _, _, what in unpacked(both)[0]] == [
        "Publish",
        "ContentHeader",
        "ContentBody",
        "Publish",
        "ContentHeader",
    ]


@pytest.mark.parametrize("field", ["exchange", "routing_key", "correlation_id", "reply_to"])
def test_a_name_that_is_too_long(field: str) -> None:
    """It is counted in bytes, and refused before anything is written."""
    given_: dict[str, Any] = {"exchange": "x", "routing_key": "k"}
    assert frames.publish(1, body=b"", **(given_ | {field: "é" * 127 + "e"}))
    with pytest.raises(ValueError, match="has 256 bytes; AMQP allows 255"):
        frames.publish(1, body=b"", **(given_ | {field: "é" * 128}))
