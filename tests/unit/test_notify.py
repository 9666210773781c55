"""The notifier: in order, at least once, whatever the connection does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from jef_daemon import notify
from jef_daemon.notify import Notifier
from jef_daemon.ports import MessageRefused, Outgoing


def message(number: int) -> Outgoing:
    return Outgoing(number, "x", "k", b"%d" % number)


class FakeOutbox:
    """Keeps messages like the ledger's table does."""

    def __init__(self) -> None:
        self.kept: dict[int, Outgoing] = {}
        self.during_read: list[Outgoing] = []
        self.on_commit: Notifier | None = None
        self.before_read: Callable[[], Awaitable[None]] | None = None

    def commit(self, *messages: Outgoing) -> None:
        self.kept.update({each.id: each for each in messages})
        if self.on_commit:
            self.on_commit.put(list(messages))

    async def outbox(self, after: int, limit: int) -> list[Outgoing]:
        if self.before_read:
            await self.before_read()
        found = [self.kept[number] for number in sorted(self.kept) if number > after][:limit]
        if self.during_read:
            self.commit(self.during_read.pop(0))
        return found

    async def confirm(self, ids: Sequence[int]) -> None:
        for number in ids:
            del self.kept[number]


class FakeBus:
    """Takes batches; a test says which are confirmed and when the connection is lost."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], asyncio.Future[None]]] = []
        self.came = asyncio.Event()
        self.confirms = True
        self.refuses = 0
        self.after_publish: Callable[[], Awaitable[None]] | None = None

    async def publish(self, messages: Sequence[Outgoing]) -> Awaitable[None]:
        if self.refuses:
            self.refuses -= 1
            raise ConnectionError("away")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.batches.append(([each.id for each in messages], done))
        if self.confirms:
            done.set_result(None)
        self.came.set()
        if self.after_publish:
            await self.after_publish()
        return done

    @property
    def sent(self) -> list[int]:
        return [number for batch, _ in self.batches for number in batch]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_PAUSE_S", 0)


async def start(outbox: FakeOutbox, bus: FakeBus) -> tuple[Notifier, asyncio.Task[None]]:
    notifier = Notifier(outbox, bus)
    outbox.on_commit = notifier
    return notifier, asyncio.create_task(notifier.run())


async def finish(notifier: Notifier, task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(5):
        await notifier.flush()
    task.cancel()


async def test_what_an_earlier_life_left_comes_first() -> None:
    """Then what is committed now, each once."""
    outbox, bus = FakeOutbox(), FakeBus()
    outbox.commit(*map(message, range(1, 1201)))
    notifier, task = await start(outbox, bus)
    outbox.commit(message(1201))
    await finish(notifier, task)
    assert bus.sent == list(range(1, 1202))
    assert outbox.kept == {}


async def test_a_commit_during_the_reading_is_not_missed() -> None:
    """The race between a page read from the ledger and the hand-over of a commit."""
    outbox, bus = FakeOutbox(), FakeBus()
    outbox.during_read = [message(7), message(8)]
    notifier, task = await start(outbox, bus)
    await finish(notifier, task)
    assert bus.sent == [7, 8]


async def test_a_commit_that_was_read_before_it_was_handed_over_is_sent_once() -> None:
    """A handed-back job that went out twice would run on two daemons."""
    outbox, bus = FakeOutbox(), FakeBus()
    notifier, task = await start(outbox, bus)
    outbox.on_commit = None  # on disk already, the news of it still on its way to the event loop
    outbox.commit(message(1), message(2))
    async with asyncio.timeout(5):
        await notifier.flush()
    notifier.put([message(1), message(2)])
    notifier.put([message(3)])
    outbox.kept[3] = message(3)
    await finish(notifier, task)
    assert bus.sent == [1, 2, 3]


async def test_everything_unconfirmed_is_sent_again_in_order() -> None:
    """Also what was on its way when the connection was lost."""
    outbox, bus = FakeOutbox(), FakeBus()
    bus.confirms = False
    notifier, task = await start(outbox, bus)
    outbox.commit(message(1), message(2))
    await asyncio.wait_for(bus.came.wait(), 5)
    bus.came.clear()
    outbox.commit(message(3))
    await asyncio.wait_for(bus.came.wait(), 5)
    [(_, first), (_, second)] = bus.batches
    bus.confirms = True
    second.set_result(None)
    first.set_exception(ConnectionError("lost"))
    await finish(notifier, task)
    assert bus.sent == [1, 2, 3, 1, 2]
    assert outbox.kept == {}


@pytest.mark.parametrize("while_reading", [True, False])
async def test_nothing_overtakes_what_was_lost(monkeypatch: pytest.MonkeyPatch, while_reading: bool) -> None:
    """However much is to be told: whoever heard the later first would take the earlier for old."""
    monkeypatch.setattr(notify, "_AT_ONCE", 2)
    outbox, bus = FakeOutbox(), FakeBus()
    bus.confirms = False

    async def lose() -> None:
        if not bus.confirms and len(bus.batches) == (1 if while_reading else 2):
            bus.confirms = True
            for _, confirmed in bus.batches:
                confirmed.set_exception(ConnectionError("lost"))
        for _ in range(3):
            await asyncio.sleep(0)

    if while_reading:
        outbox.before_read = lose
        outbox.commit(*map(message, range(1, 7)))
    notifier, task = await start(outbox, bus)
    if not while_reading:
        await notifier.flush()
        bus.after_publish = lose
        outbox.commit(*map(message, range(1, 7)))
    await finish(notifier, task)
    sent = [1, 2] if while_reading else [1, 2, 3, 4]
    assert bus.sent == [*sent, 1, 2, 3, 4, 5, 6]


async def test_what_a_full_queue_refuses_holds_nothing_else_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent again and again, and the others go on."""
    monkeypatch.setattr(notify, "_AT_ONCE", 2)
    outbox, bus = FakeOutbox(), FakeBus()

    async def refuse() -> None:
        batch, confirmed = bus.batches[-1]
        if 1 in batch and len(bus.batches) < 10:
            confirmed.set_exception(MessageRefused("full"))
        elif not confirmed.done():
            confirmed.set_result(None)
        for _ in range(3):
            await asyncio.sleep(0)

    bus.confirms, bus.after_publish = False, refuse
    outbox.commit(*map(message, range(1, 7)))
    notifier, task = await start(outbox, bus)
    await finish(notifier, task)
    assert bus.sent == [1, 2, 3, 4, 5, 6, *[1, 2] * 7]


async def test_what_is_on_its_way_is_waited_for_before_anything_is_sent_again() -> None:
    """It may still be confirmed: else it would go out twice for nothing."""
    outbox, bus = FakeOutbox(), FakeBus()
    bus.confirms = False
    notifier, task = await start(outbox, bus)
    for number in (1, 2):
        outbox.commit(message(number))
        await asyncio.wait_for(bus.came.wait(), 5)
        bus.came.clear()
    [(_, first), (_, second)] = bus.batches
    bus.confirms = True
    first.set_exception(ConnectionError("lost"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert bus.sent == [1, 2]
    second.set_result(None)
    await finish(notifier, task)
    assert bus.sent == [1, 2, 1]


async def test_what_the_broker_takes_to_confirm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hand-over on; what it refused was not confirmed."""
    now = 100.0
    monkeypatch.setattr(notify, "monotonic", lambda: now)
    outbox, bus = FakeOutbox(), FakeBus()
    bus.confirms = False
    told: list[float] = []
    notifier, task = await start(outbox, bus)
    notifier.on_confirmed = told.append
    outbox.commit(message(1))
    await asyncio.wait_for(bus.came.wait(), 5)
    bus.came.clear()
    now += 9
    bus.batches[0][1].set_exception(ConnectionError("refused"))
    await asyncio.wait_for(bus.came.wait(), 5)
    now += 3
    bus.batches[1][1].set_result(None)
    await finish(notifier, task)
    assert told == [3.0]


async def test_a_refused_publish_is_tried_again() -> None:
    """The connection was lost just before."""
    outbox, bus = FakeOutbox(), FakeBus()
    bus.refuses = 2
    notifier, task = await start(outbox, bus)
    outbox.commit(message(1), message(2))
    await finish(notifier, task)
    assert bus.sent == [1, 2]


async def test_more_than_fits_in_memory_waits_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes in order, each once."""
    monkeypatch.setattr(notify, "_IN_MEMORY", 3)
    outbox, bus = FakeOutbox(), FakeBus()
    notifier, task = await start(outbox, bus)
    await notifier.flush()
    for number in range(1, 50):
        outbox.commit(message(number))
    assert notifier.depth <= 5
    await finish(notifier, task)
    assert bus.sent == list(range(1, 50))
