"""The tap in the stream: who takes has his frames, the library has all others, in order, however the bytes come."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import body, commands, frame, header, heartbeat

from jef_daemon.rabbitmq.tap import BODY, HEADER, METHOD, Tap

HEARTBEAT = frame.marshal(heartbeat.Heartbeat(), 0)
KINDS: dict[int, Any] = {
    METHOD: commands.Basic.Ack(7, True),
    HEADER: header.ContentHeader(0, 3),
    BODY: body.ContentBody(b"\xce\1\2"),
}
"""Of each type one; a body may hold what looks like a frame's end and begin."""


def marshalled(kind: int, channel: int) -> bytes:
    return frame.marshal(KINDS[kind], channel)


def cut(stream: bytes, at: Sequence[int]) -> list[bytes]:
    """A stream in pieces."""
    places = sorted({0, len(stream), *(place % (len(stream) + 1) for place in at)})
    return [stream[begin:end] for begin, end in itertools.pairwise(places)]


async def read(tap: Tap) -> bytes:
    """All that the library was given, heartbeats aside."""
    tap.feed_eof()
    return (await tap.read()).replace(HEARTBEAT, b"")


frames = st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 3)), max_size=12)


@given(frames, st.sets(st.sampled_from(sorted(KINDS))), st.lists(st.integers(0, 500), max_size=8))
def test_each_frame_goes_one_way(sent: list[tuple[int, int]], wanted: set[int], at: list[int]) -> None:
    """Channel 1 is taken from by type, channel 2 shown and declined, channel 3 not shown."""

    async def run() -> None:
        tap = Tap()
        taken: list[tuple[int, bytes]] = []
        shown: list[int] = []

        def take(kind: int, payload: bytes) -> bool:
            if kind in wanted:
                taken.append((kind, payload))
            return kind in wanted

        def decline(kind: int, payload: bytes) -> bool:
            shown.append(kind)
            return False

        tap.take(1, take)
        tap.take(2, decline)
        for piece in cut(b"".join(marshalled(*each) for each in sent), at):
            tap.feed_data(piece)
        ours = [(kind, channel) for kind, channel in sent if channel == 1 and kind in wanted]
        assert taken == [(kind, marshalled(kind, channel)[7:-1]) for kind, channel in ours]
        assert shown == [kind for kind, channel in sent if channel == 2]
        assert await read(tap) == b"".join(marshalled(*each) for each in sent if each not in ours)

    asyncio.run(run())


@given(frames, st.integers(1, 20), st.lists(st.integers(0, 500), max_size=8))
def test_the_end_may_come_within_a_frame(sent: list[tuple[int, int]], less: int, at: list[int]) -> None:
    """The library sees the beginning, and says what it says of a lost connection."""

    async def run() -> None:
        stream = b"".join(marshalled(*each) for each in sent)[:-less]
        tap = Tap()
        for piece in cut(stream, at):
            tap.feed_data(piece)
        assert await read(tap) == stream

    asyncio.run(run())


@pytest.mark.parametrize(
    "stream",
    [
        b"AMQP\0\0\x09\1",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        marshalled(METHOD, 3) + marshalled(METHOD, 1)[:-1] + b"!" + b"more",
        b"\x01\0\1\xff\xff\xff\xff",
    ],
)
async def test_what_is_no_amqp_is_not_held_back(stream: bytes) -> None:
    """Nor is anything behind it looked at: where a frame begins is not known any more."""
    tap = Tap()
    tap.take(1, lambda *_: pytest.fail("it was taken for a frame"))
    tap.feed_data(stream)
    async with asyncio.timeout(5):
        assert await tap.readexactly(len(stream)) == stream
    tap.feed_data(marshalled(METHOD, 1))
    assert await read(tap) == marshalled(METHOD, 1)


async def test_the_library_hears_that_the_broker_lives() -> None:
    """As often as it needs to, and not more often."""
    tap = Tap()
    now = [100.0]
    tap._loop_time = lambda: now[0]
    tap.take(1, lambda *_: True)
    heard: list[int] = []
    for step_s in (0.0, 0.5, 0.4, 0.2, 30.0, 0.1):
        now[0] += step_s
        before = len(tap._buffer)  # type: ignore[attr-defined]  # the library's side of the stream
        tap.feed_data(marshalled(METHOD, 1))
        heard.append((len(tap._buffer) - before) // len(HEARTBEAT))  # type: ignore[attr-defined]
    assert heard == [1, 0, 0, 1, 1, 0]


async def test_who_leaves_is_shown_no_more() -> None:
    tap = Tap()
    shown: list[int] = []

    def take(kind: int, payload: bytes) -> bool:
        shown.append(kind)
        return True

    tap.take(1, take)
    tap.feed_data(marshalled(METHOD, 1))
    tap.leave(1)
    tap.leave(1)
    tap.feed_data(marshalled(METHOD, 1))
    assert len(shown) == 1
    assert await read(tap) == marshalled(METHOD, 1)
