"""Frames that the library cannot decode: the rest of the message is read."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame, header
from pamqp.exceptions import UnmarshalingException

from jef_daemon.rabbitmq import unreadable
from jef_daemon.rabbitmq.unreadable import unmarshal

MARK = "MARKMARK"
"""Stands for the bytes that are no text, in frames that the library packs."""
BAD = b"\xff\xfe\x80MARK"
BEYOND = 2**63
"""Nanoseconds since the epoch, or worse, in place of seconds."""


def marshalled(what: Any) -> bytes:
    return frame.marshal(what, 7).replace(MARK.encode(), BAD.ljust(len(MARK), b"!"))


@pytest.mark.parametrize(
    "properties",
    [
        {"correlation_id": MARK},
        {"reply_to": MARK},
        {"content_type": MARK},
        {"headers": {MARK: 1}},
    ],
)
def test_a_property_that_is_no_text_leaves_the_body_s_size(properties: dict[str, Any]) -> None:
    data = marshalled(header.ContentHeader(0, 12345, commands.Basic.Properties(**properties)))
    with pytest.raises(UnmarshalingException):
        frame._unmarshal_header_frame(data[7:-1])
    used, channel, found = unmarshal(data)
    assert isinstance(found, header.ContentHeader)
    assert (used, channel, found.body_size) == (len(data), 7, 12345)
    assert found.properties.correlation_id is None
    assert not found.properties.headers


def test_a_timestamp_beyond_the_calendar_leaves_the_body_s_size() -> None:
    payload = struct.pack(">HHQHQ", 60, 0, 5, 1 << 6, BEYOND)
    data = struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce"
    found = unmarshal(data)[2]
    assert isinstance(found, header.ContentHeader)
    assert found.body_size == 5


@pytest.mark.parametrize("redelivered", [True, False])
def test_a_delivery_with_a_key_that_is_no_text_keeps_its_number(redelivered: bool) -> None:
    found = unmarshal(marshalled(commands.Basic.Deliver("tag.1", 2**40, redelivered, "jobs", MARK)))[2]
    assert isinstance(found, commands.Basic.Deliver)
    assert (found.consumer_tag, found.delivery_tag, found.redelivered) == ("tag.1", 2**40, redelivered)
    assert (found.exchange, found.routing_key) == ("jobs", "???MARK!")


def test_a_message_that_was_asked_for_keeps_its_number_and_how_many_wait() -> None:
    found = unmarshal(marshalled(commands.Basic.GetOk(9, True, "", MARK, 77)))[2]
    assert isinstance(found, commands.Basic.GetOk)
    assert (found.delivery_tag, found.redelivered, found.exchange) == (9, True, "")
    assert (found.routing_key, found.message_count) == ("???MARK!", 77)


def test_a_broken_frame_is_still_refused() -> None:
    with pytest.raises(UnmarshalingException):
        unmarshal(b"\x01\x00\x01\x00\x00\x00\x04\xff\xff\xff\xff\xce")


names = st.from_regex(r"[a-zA-Z0-9._:-]{0,100}", fullmatch=True)


@given(st.integers(0, 2**63 - 1), st.booleans(), names, names, names)
def test_both_kinds_are_read_as_the_library_reads_good_ones(
    number: int, again: bool, tag: str, exchange: str, key: str
) -> None:
    deliver = commands.Basic.Deliver(tag, number, again, exchange, key)
    assert dict(unreadable._deliver(frame.marshal(deliver, 3)[11:-1])) == dict(deliver)
    found = commands.Basic.GetOk(number, again, exchange, key, number % 1000)
    assert dict(unreadable._get_ok(frame.marshal(found, 3)[11:-1])) == dict(found)
