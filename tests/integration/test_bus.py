"""The bus on a real broker: what only shows between two steps of a session's set-up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from yarl import URL

from jef_daemon.names import WATCHED, Names
from jef_daemon.ports import Delivery, MessageReturned, Outgoing
from jef_daemon.rabbitmq import RabbitBus, topology
from jef_daemon.rabbitmq.session import Session, open_connection
from jef_daemon.sections import Bus
from tests.support.amqp import Client
from tests.support.proxy import Proxy
from tests.support.services import certificate


@contextlib.asynccontextmanager
async def running(bus: RabbitBus) -> AsyncIterator[None]:
    task = asyncio.create_task(bus.run())
    try:
        async with asyncio.timeout(30):
            await bus.connected.wait()
        yield
    finally:
        await bus.stop()
        task.cancel()
        await asyncio.wait({task})


async def test_what_comes_while_the_session_is_set_up_is_acknowledged(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first queue delivers before the second is consumed; its acknowledgement must not get lost.

    It would be held for half an hour, and then the broker would close the channel for it.
    """
    names = Names(client.prefix)
    acknowledged = asyncio.Event()
    came: list[Delivery] = []
    tasks = []

    async def acknowledge(delivery: Delivery) -> None:
        await bus.acknowledge([delivery])
        acknowledged.set()

    def take(delivery: Delivery) -> None:
        came.append(delivery)
        tasks.append(asyncio.create_task(acknowledge(delivery)))

    consume = Session.consume

    async def slowly(session: Session, source: str, queue: str) -> None:
        if source == "slow" and "slow" not in session._tags:
            async with asyncio.timeout(20):
                await acknowledged.wait()
        await consume(session, source, queue)

    bus = RabbitBus(client.url, names, ["quick", "slow"], Bus(), take)
    async with running(bus):
        await client.submit("quick", "1")
    monkeypatch.setattr(Session, "consume", slowly)
    bus = RabbitBus(client.url, names, ["quick", "slow"], Bus(), take)
    for action in ("quick", "slow"):
        await bus.resume(action)
    async with running(bus):
        assert [delivery.source for delivery in came] == ["quick"]
    queue = await client.channel.declare_queue(names.job_queue("quick"), passive=True)
    assert queue.declaration_result.message_count == 0
    assert len(came) == 1


async def test_the_watcher_hears_of_watched_executions_only(client: Client) -> None:
    """A headers exchange overlooks headers that begin with x-: by such a one every notification would come."""
    names = Names(client.prefix)
    came: asyncio.Queue[Delivery] = asyncio.Queue()
    bus = RabbitBus(client.url, names, [], Bus(), came.put_nowait, ledger="ours", watches_only=True)
    async with running(bus):
        await bus.resume(topology.WATCHED)
        told = [
            Outgoing(number, names.status, "nap.running", b'{"executionId": "%d"}' % number, headers)
            for number, headers in enumerate(({}, {WATCHED: "theirs"}, {WATCHED: "ours"}))
        ]
        await (await bus.publish(told))
        async with asyncio.timeout(20):
            first = await came.get()
    assert json.loads(first.body)["executionId"] == "2"
    assert came.empty()


async def test_long_messages_come_whole_and_in_order_over_tls(client: Client, tmp_path: Path) -> None:
    """In frames that are cut at the broker's limit, and reads that are cut anywhere."""
    names = Names(client.prefix)
    came: asyncio.Queue[Delivery] = asyncio.Queue()
    bodies = [
        json.dumps({"executionId": str(size), "x": "x" * size}).encode() for size in (0, 300_000, 9, 131_064)
    ]
    async with Proxy(client.url, certificate(tmp_path)) as proxy:
        url = f"{proxy.url}?cafile={tmp_path / 'certificate.pem'}"
        bus = RabbitBus(url, names, ["nap"], Bus(), came.put_nowait)
        async with running(bus):
            await bus.resume("nap")
            await (await bus.publish([Outgoing(0, names.jobs, "nap", body) for body in bodies]))
            async with asyncio.timeout(20):
                deliveries = [await came.get() for _ in bodies]
            assert [delivery.body for delivery in deliveries] == bodies
            assert [delivery.tag for delivery in deliveries] == [1, 2, 3, 4]
            await bus.acknowledge(deliveries)


async def test_what_there_is_no_queue_for_is_told_and_nothing_else_is_touched(client: Client) -> None:
    """No channel is opened to ask, and none is lost over it."""
    names = Names(client.prefix)
    came: asyncio.Queue[Delivery] = asyncio.Queue()
    bus = RabbitBus(client.url, names, ["nap"], Bus(), came.put_nowait)
    async with running(bus):
        await bus.resume("nap")
        session = bus.session
        sent = []
        for number in range(50):
            nobody, somebody = names.daemon(f"nobody-{number}"), names.job_queue("nap")
            for queue in (nobody, somebody):
                message = Outgoing(0, "", queue, b"%d" % number, {"a": "b"}, "c", "asker", is_mandatory=True)
                sent.append(await bus.publish([message]))
        async with asyncio.timeout(20):
            told = await asyncio.gather(*sent, return_exceptions=True)
            bodies = [(await came.get()).body for _ in range(50)]
        assert bodies == [b"%d" % number for number in range(50)]
        assert [type(each) for each in told] == [MessageReturned, type(None)] * 50
        assert (bus.session, bus.unconfirmed) == (session, 0)


async def test_one_that_cannot_be_taken_leaves_the_others_alone(client: Client) -> None:
    """Whoever takes deliveries may fail at one: the next comes, by the same connection."""
    names = Names(client.prefix)
    came: asyncio.Queue[Delivery] = asyncio.Queue()
    failures: list[str] = []

    def take(delivery: Delivery) -> None:
        if json.loads(delivery.body)["executionId"] == "bad":
            raise LookupError("not that one")
        came.put_nowait(delivery)

    asyncio.get_running_loop().set_exception_handler(
        lambda _, about: failures.append(str(about["exception"]))
    )
    bus = RabbitBus(client.url, names, ["nap"], Bus(), take)
    async with running(bus):
        await bus.resume("nap")
        session = bus.session
        for name in ("bad", "good"):
            await client.submit("nap", name)
        async with asyncio.timeout(20):
            delivery = await came.get()
        assert (json.loads(delivery.body)["executionId"], delivery.session) == ("good", session)
    assert failures == ["not that one"]


async def test_an_answer_that_meets_a_closing_connection_has_lost_it(client: Client) -> None:
    """In the words of everything that a lost connection takes along: else it would be its own message's fault."""
    bus = RabbitBus(client.url, Names(client.prefix), [], Bus(), lambda _: None)
    async with running(bus):
        session = bus._session
        assert session is not None
        closing = asyncio.create_task(session._connection.close())
        await asyncio.sleep(0)
        assert not session.is_broken
        with pytest.raises(ConnectionError):
            await bus.publish([Outgoing(0, "", "foreign", b"{}")])
        await closing


@pytest.mark.parametrize("patience_s", [10.0, 0.1], ids=["refused", "given up"])
async def test_a_connection_that_was_not_opened_is_closed(patience_s: float) -> None:
    """Else it would close itself when it is thrown away, in a task that no loop may be there for any more."""
    made: list[aio_pika.Connection] = []

    class Kept(aio_pika.Connection):
        def __init__(self, url: URL, **options: Any) -> None:
            super().__init__(url, **options)
            made.append(self)

    with socket.socket() as broker:
        broker.bind(("127.0.0.1", 0))
        if patience_s < 1:
            broker.listen()
        url = f"amqp://127.0.0.1:{broker.getsockname()[1]}/"
        with pytest.raises((ConnectionError, TimeoutError)):
            await open_connection(url, timeout=patience_s, connection_class=Kept)
    assert [connection.is_closed for connection in made] == [True]
