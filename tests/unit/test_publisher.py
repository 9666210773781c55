"""Confirmations, one by one or many at once, in whatever order the broker has it: each batch ends once."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import aiormq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame
from pamqp.heartbeat import Heartbeat

from jef_daemon.ports import MessageRefused, MessageReturned, Outgoing
from jef_daemon.rabbitmq.publisher import Publisher
from jef_daemon.rabbitmq.tap import Tap

CHANNEL = 4


class Channel:
    """What a publisher needs of the library's channel: what is written stays in its queue."""

    def __init__(self) -> None:
        self.number = CHANNEL
        self.connection = self
        self.connection_tune = self
        self.frame_max = 131_072
        self.write_queue: asyncio.Queue[Any] = asyncio.Queue()


class Broker:
    """A publisher, and the broker at the other end of its tap."""

    def __init__(self, window: int = 1000) -> None:
        self.tap = Tap()
        self.channel = Channel()
        self.publisher = Publisher(self.tap, cast("aiormq.Channel", self.channel), window)

    def confirm(self, number: int, *, multiple: bool = False, refused: bool = False) -> None:
        kind = commands.Basic.Nack if refused else commands.Basic.Ack
        self.tap.feed_data(frame.marshal(kind(number, multiple), CHANNEL))

    async def publish(self, count: int) -> asyncio.Future[None]:
        return await self.publisher.publish([Outgoing(number, "x", "k", b"") for number in range(count)])


CONFIRMS = st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=30)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), CONFIRMS)
def test_a_batch_is_confirmed_when_all_of_it_is(sizes: list[int], confirms: list[tuple[int, bool]]) -> None:
    """As somebody would count who remembers each number."""

    async def run() -> None:
        broker = Broker()
        batches = []
        total = 0
        for size in sizes:
            batches.append((await broker.publish(size), set(range(total + 1, total + size + 1))))
            total += size
        open_ = set(range(1, total + 1))
        for number, multiple in confirms:
            if number > total:
                continue
            broker.confirm(number, multiple=multiple)
            open_ -= set(range(1, number + 1)) if multiple else {number}
            assert [future.done() for future, _ in batches] == [not numbers & open_ for _, numbers in batches]
            await asyncio.sleep(0)
            still = sum(len(numbers) for _, numbers in batches if numbers & open_)
            assert broker.publisher.unconfirmed == still

    asyncio.run(run())


async def test_a_batch_of_which_one_is_refused_is_to_be_sent_again() -> None:
    broker = Broker()
    first, second = await broker.publish(2), await broker.publish(2)
    broker.confirm(1)
    broker.confirm(2, refused=True)
    broker.confirm(4, multiple=True)
    with pytest.raises(MessageRefused, match="refused"):
        await first
    await second
    await asyncio.sleep(0)
    assert broker.publisher.unconfirmed == 0


async def test_what_there_is_no_queue_for_is_given_back_to_who_wants_to_know() -> None:
    """By its number, whatever is confirmed meanwhile; the library, which knows nothing of it, hears nothing."""
    broker = Broker()
    body = b"x" * 200_000
    message = Outgoing(0, "", "nobody", body, {"a": 1}, "c", "asker", is_mandatory=True)
    first = await broker.publisher.publish([message])
    second = await broker.publisher.publish([message])
    third = await broker.publish(1)
    written = b"".join(broker.channel.write_queue.get_nowait().payload for _ in range(2))
    head = written[len(written) // 2 :]
    _, _, method = frame.unmarshal(head)
    assert isinstance(method, commands.Basic.Publish)
    assert (method.mandatory, method.routing_key) == (True, "nobody")
    content = head[frame.unmarshal(head)[0] :]
    broker.confirm(1)
    given_back = commands.Basic.Return(312, "NO_ROUTE", "", "nobody")
    broker.tap.feed_data(frame.marshal(given_back, CHANNEL) + content)
    assert not second.done()
    broker.confirm(3, multiple=True)
    for each in (first, third):
        await each
    with pytest.raises(MessageReturned, match="no queue"):
        await second
    broker.tap.feed_eof()
    heartbeat = frame.marshal(Heartbeat(), 0)
    assert (await broker.tap.read()).replace(heartbeat, b"") == b""


async def test_what_the_channel_took_along_is_to_be_sent_again() -> None:
    """What it said before it went counts; what comes behind is nobody's."""
    broker = Broker()
    first, second = await broker.publish(1), await broker.publish(1)
    broker.confirm(1)
    broker.publisher.fail("the channel was closed")
    broker.confirm(2)
    await first
    assert frame.marshal(commands.Basic.Ack(2, False), CHANNEL) in await broker.tap.read(
        100
    )  # nobody takes it
    with pytest.raises(ConnectionError, match="was closed"):
        await second


async def test_nothing_is_written_while_the_window_is_full() -> None:
    broker = Broker(window=3)
    await broker.publish(3)
    waiting = asyncio.create_task(broker.publish(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert (waiting.done(), broker.channel.write_queue.qsize()) == (False, 1)
    broker.confirm(3, multiple=True)
    confirmed = await waiting
    broker.confirm(4)
    await confirmed
    assert broker.channel.write_queue.qsize() == 2


async def test_nothing_to_publish_is_confirmed_at_once() -> None:
    broker = Broker()
    await (await broker.publish(0))
    assert broker.channel.write_queue.empty()


async def test_who_waits_for_the_window_hears_that_the_channel_is_gone() -> None:
    """Nobody would ever confirm what was written to it then."""
    broker = Broker(window=1)
    first = await broker.publish(1)
    waiting = asyncio.create_task(broker.publish(1))
    await asyncio.sleep(0)
    broker.publisher.fail("the channel was closed")
    async with asyncio.timeout(5):
        for each in (waiting, first):
            with pytest.raises(ConnectionError, match="was closed"):
                await each
    assert broker.channel.write_queue.qsize() == 1


async def test_who_waits_to_write_hears_that_the_channel_is_gone() -> None:
    """The library's queue is full, and its writer has ended."""
    broker = Broker()
    broker.channel.write_queue = asyncio.Queue(1)
    await broker.publish(1)
    waiting = asyncio.create_task(broker.publish(1))
    for _ in range(3):
        await asyncio.sleep(0)
    broker.publisher.fail("the channel was closed")
    async with asyncio.timeout(5):
        confirmed = await waiting
        with pytest.raises(ConnectionError, match="was closed"):
            await confirmed


async def test_messages_are_written_in_the_order_of_their_numbers() -> None:
    """Also where one could be put in while another waits for room: each would be confirmed for the other."""
    broker = Broker()
    queue: asyncio.Queue[Any] = asyncio.Queue(1)
    broker.channel.write_queue = queue
    await broker.publish(1)
    long = asyncio.create_task(broker.publish(7))
    for _ in range(3):
        await asyncio.sleep(0)
    written = [queue.get_nowait().payload]

    async def take() -> None:
        written.extend([(await queue.get()).payload, (await queue.get()).payload])

    taking = asyncio.create_task(take())
    short = await broker.publish(1)  # begins before the one who waits has been told of the room
    await taking
    assert len(written[1]) > len(written[2])
    for number in range(2, 9):
        broker.confirm(number)
    assert ((await long).done(), short.done()) == (True, False)
