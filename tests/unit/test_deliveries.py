"""Frames as the library packs them are read as deliveries, whatever a producer wrote into them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import body as bodies
from pamqp import commands, frame, header

from jef_daemon.ports import Delivery
from jef_daemon.rabbitmq.deliveries import Deliveries
from tests.unit.test_frames import KEYS, short, values

MARK = "MARKMARK"
BAD = b"\xff\xfe\x80MARK!"


def frames(
    body: bytes, room: int = 131_064, tag: str = "nap.1", key: str = "nap", **properties: Any
) -> list[tuple[int, bytes]]:
    """Type and payload of each frame of a delivery."""
    what: list[Any] = [
        commands.Basic.Deliver(tag, 9, properties.pop("again", False), "jef.jobs", key),
        header.ContentHeader(0, len(body), commands.Basic.Properties(**properties)),
    ]
    what += [bodies.ContentBody(body[at : at + room]) for at in range(0, len(body), room)]
    marshalled = [frame.marshal(each, 3).replace(MARK.encode(), BAD) for each in what]
    return [(each[0], each[7:-1]) for each in marshalled]


def reader() -> tuple[Deliveries, list[Delivery]]:
    came: list[Delivery] = []
    deliveries = Deliveries(5, came.append)
    deliveries.expect("nap.1", "nap")
    deliveries.expect("x", "unroutable")
    return deliveries, came


OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "content_type": short(1),
        "content_encoding": short(1),
        "delivery_mode": st.integers(1, 2),
        "priority": st.integers(1, 255),
        "expiration": short(1),
        "message_id": short(1),
        "timestamp": st.just(datetime(2026, 1, 2, tzinfo=UTC)),
        "message_type": short(1),
        "user_id": short(1),
        "app_id": short(1),
    },
)


@given(
    body=st.binary(max_size=40),
    room=st.integers(1, 50),
    key=short(),
    again=st.booleans(),
    headers=st.none() | st.dictionaries(KEYS, values, min_size=1, max_size=4),
    correlation_id=st.none() | short(1),
    reply_to=st.none() | short(1),
    others=OTHERS,
)
def test_what_was_sent_is_delivered(
    body: bytes,
    room: int,
    key: str,
    again: bool,
    headers: Mapping[str, Any] | None,
    correlation_id: str | None,
    reply_to: str | None,
    others: Mapping[str, Any],
) -> None:
    """Whatever other properties stand before and between those that we use."""
    deliveries, came = reader()
    sent = frames(
        body,
        room,
        key=key,
        again=again,
        headers=headers,
        correlation_id=correlation_id,
        reply_to=reply_to,
        **others,
    )
    for number, each in enumerate(sent):
        assert came == [], number
        assert deliveries(*each)
    expected = Delivery("nap", body, 9, 5, again, key, headers or {}, reply_to, correlation_id)
    assert came == [expected]


@pytest.mark.parametrize("name", ["correlation_id", "reply_to", "headers"])
def test_properties_that_cannot_be_read_are_none(name: str) -> None:
    """The message is there all the same: it would come again and again."""
    deliveries, came = reader()
    bad: dict[str, Any] = {name: {MARK: 1} if name == "headers" else MARK}
    for each in frames(b"{}", **({"correlation_id": "1", "reply_to": "q"} | bad)):
        assert deliveries(*each)
    assert came == [Delivery("nap", b"{}", 9, 5, False, "nap")]


def test_properties_that_are_cut_short_are_none() -> None:
    deliveries, came = reader()
    deliver, head, content = frames(b"{}", correlation_id="a" * 9, reply_to="b" * 9)
    for cut in range(1, len(head[1]) - 14):
        for each in (deliver, (head[0], head[1][:-cut]), content):
            assert deliveries(*each)
        assert came.pop().body == b"{}"


def test_a_key_that_is_no_text_keeps_what_is() -> None:
    deliveries, came = reader()
    for each in frames(b"", key=MARK):
        deliveries(*each)
    assert [delivery.routing_key for delivery in came] == ["???MARK!"]


def test_each_consumer_s_deliveries_are_of_its_source() -> None:
    deliveries, came = reader()
    for each in frames(b"1") + frames(b"2", tag="x") + frames(b"3"):
        deliveries(*each)
    assert [(delivery.source, delivery.body) for delivery in came] == [
        ("nap", b"1"),
        ("unroutable", b"2"),
        ("nap", b"3"),
    ]


def test_all_else_is_the_library_s() -> None:
    """Answers and closes of a channel, and the content of what was asked for or returned."""
    deliveries, came = reader()
    for each in frames(b"1"):
        assert deliveries(*each)
    came.clear()
    for what in (
        commands.Basic.ConsumeOk("nap.1"),
        commands.Channel.Close(404, "gone", 60, 20),
        commands.Basic.GetOk(1, False, "", "k", 0),
        header.ContentHeader(0, 1),
        bodies.ContentBody(b"1"),
    ):
        data = frame.marshal(what, 3)
        assert not deliveries(data[0], data[7:-1])
    assert came == []
