"""A daemon's side of the locks, without broker and ledger: what an answer to a renewal says of what runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from jef_daemon.lock import client as module
from jef_daemon.lock.client import LockClient
from jef_daemon.ports import Delivery, Heard, LockTimes, Lost, Outgoing

TIMES = LockTimes(lease_s=120.0)


class Clock:
    """What the client takes for the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.set_by = 0.0
        """How far the wall clock was set."""

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.set_by


class World:
    """A ledger that knows nothing, a bus that keeps what is published."""

    session = 1

    def __init__(self, times: LockTimes) -> None:
        self.rows: dict[str, list[str]] = {}
        """Owners by the state of their locks."""
        self.answered_up_to = 0.0
        self.heard: list[Heard] = []
        self.lost: list[Lost] = []
        self.will_lose: list[Lost] = []
        """What the ledger makes of each answer."""
        self.sent: asyncio.Queue[Outgoing] = asyncio.Queue()
        self.done: asyncio.Queue[int] = asyncio.Queue()
        """How many deliveries were acknowledged, each time."""
        self.client = LockClient(self, self, "t.locks", "t.lock-replies.1", times, lambda: None, self._lose)

    def _lose(self, lost: Lost) -> None:
        self.lost.append(lost)
        self.done.put_nowait(0)

    def hearing(self, heard: Sequence[Heard]) -> asyncio.Future[list[Lost]]:
        if any(each.reply.owner == "spoiled" for each in heard):
            raise KeyError("a fault")
        self.heard += heard
        future: asyncio.Future[list[Lost]] = asyncio.get_running_loop().create_future()
        future.set_result(self.will_lose)
        return future

    async def go_on_locking(self, answered_up_to: float) -> int:
        self.answered_up_to = answered_up_to
        return 0

    async def lock_states(self, state: str, after: str = "") -> list[str]:
        return [name for name in self.rows.get(state, ()) if name > after][:2]

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self.done.put_nowait(len(deliveries))

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        for message in messages:
            self.sent.put_nowait(message)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    async def renewal(self) -> Outgoing:
        """The next one that is sent."""
        return await asyncio.wait_for(self.sent.get(), 10)

    async def answer(self, renewal: Outgoing, **kept: list[str]) -> None:
        """Deliver an answer, and wait until it was taken."""
        body = json.dumps({"status": "KEPT", "owner": "", **kept}).encode()
        self.client.deliver(Delivery(":lock-replies", body, 1, 1, correlation_id=renewal.correlation_id))
        await asyncio.wait_for(self.done.get(), 10)

    async def loss(self) -> Lost:
        """The next one that the worker is told."""
        await asyncio.wait_for(self.done.get(), 10)
        return self.lost[-1]


@asynccontextmanager
async def running(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, times: LockTimes = TIMES, **rows: list[str]
) -> AsyncIterator[World]:
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "_TICK_S", 0.0)
    world = World(times)
    world.rows = rows
    task = asyncio.create_task(world.client.run())
    yield world
    task.cancel()
    await asyncio.wait({task})


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_a_running_job_is_renewed_under_a_number_of_its_own(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, as a grant that was not used yet lives shortly; to be answered to this daemon."""
    async with running(clock, monkeypatch) as world:
        world.client.started("1", 1)
        renewal = await world.renewal()
        assert (renewal.routing_key, renewal.reply_to) == ("t.locks", "t.lock-replies.1")
        message: dict[str, Any] = json.loads(renewal.body)
        assert (message["operation"], message["owners"], message["sole"]) == ("renew", ["1"], True)
        assert message["leaseSeconds"] == TIMES.lease_s


async def test_what_is_held_lives_a_lease_from_when_it_was_asked(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the answer: the service counts from before it."""
    async with running(clock, monkeypatch) as world:
        world.client.started("1", 1)
        renewal = await world.renewal()
        asked = clock.now
        clock.now += TIMES.margin_s - 1
        await world.answer(renewal, held=["1"], lost=[])
        clock.now = asked + TIMES.lease_s - 0.1
        await world.renewal()
        assert world.lost == []
        clock.now = asked + TIMES.lease_s
        lost = await world.loss()
        assert (lost.execution_id, lost.attempt) == ("1", 1)


async def test_a_running_job_that_waits_at_the_service_holds_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named as neither held nor lost: it is stopped when its lease is over, answers or not."""
    async with running(clock, monkeypatch) as world:
        world.client.started("1", 1)
        await world.answer(await world.renewal(), held=[], lost=[])
        clock.now += TIMES.margin_s
        assert "no word" in (await world.loss()).reason


async def test_an_answer_to_a_renewal_counts_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated by the broker it may name as lost what was granted since; it is acknowledged, no more."""
    async with running(clock, monkeypatch) as world:
        world.client.started("1", 1)
        renewal = await world.renewal()
        await world.answer(renewal, held=[], lost=["1"])
        assert len(world.heard) == 1
        await world.answer(renewal, held=[], lost=["1"])
        assert len(world.heard) == 1


async def test_what_was_answered_is_known_by_the_clock_as_it_is(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set back by an hour, all that is asked from now on would be asked again and again for an hour."""
    async with running(clock, monkeypatch) as world:
        world.client.started("1", 1)
        for _ in range(2):
            asked_at = clock.time()
            await world.answer(await world.renewal(), held=["1"], lost=[])
            async with asyncio.timeout(10):
                while world.answered_up_to != asked_at - module._SLACK_S:
                    await asyncio.sleep(0)
            clock.now += TIMES.lease_s / 2
            clock.set_by = -3600


async def test_an_answer_to_an_earlier_life_is_none(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(clock, monkeypatch) as world:
        await world.answer(Outgoing(0, "", "", b"", None, "keep#earlier#1"), held=["1"], lost=["2"])
        assert world.heard == []


async def test_what_cannot_be_read_is_acknowledged(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it cannot be read it never can."""
    async with running(clock, monkeypatch) as world:
        world.client.deliver(Delivery(":lock-replies", b"{", 1, 1, correlation_id="1#000000001"))
        assert await asyncio.wait_for(world.done.get(), 10) == 1
        assert world.heard == []


async def test_a_job_that_ended_is_not_renewed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor lost."""
    async with running(clock, monkeypatch) as world:
        world.client.started("1", 1)
        world.client.started("2", 1)
        world.client.ended("1")
        assert json.loads((await world.renewal()).body)["owners"] == ["2"]
        clock.now += TIMES.lease_s
        assert (await world.loss()).execution_id == "2"
        assert [lost.execution_id for lost in world.lost] == ["2"]


async def test_a_job_that_was_claimed_just_now_loses_its_locks_too(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs for the ledger and for the worker; that it holds locks it says with its first step only."""
    async with running(clock, monkeypatch) as world:
        world.will_lose = [Lost("1", 1, "revoked")]
        reply = json.dumps({"status": "REVOKED", "owner": "1"}).encode()
        world.client.deliver(Delivery(":lock-replies", reply, 1, 1, correlation_id="1#000000001"))
        assert await world.loss() == Lost("1", 1, "revoked")


async def test_workflows_keep_what_they_hold_for_a_lease_of_their_own(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thrice in it, however long those of jobs are; whoever waits, or is a job, is kept apart from them."""
    times = LockTimes(lease_s=7200.0, wait_s=7200.0, workflow_s=0.3)
    held = ["1", "2", "workflow/a", "workflow/b", "workflow/c"]
    async with running(clock, monkeypatch, times, held=held, waiting=["3", "workflow/d"]) as world:
        kept: list[tuple[float, float, list[str]]] = []
        while sum("workflow/c" in owners for _, _, owners in kept) < 3:
            told = json.loads((await world.renewal()).body)
            kept.append((told["leaseSeconds"], told["waitLeaseSeconds"], told["owners"]))
    assert {(lease, *owners) for lease, _, owners in kept} == {
        *((0.3, "workflow/a", "workflow/b"), (0.3, "workflow/c")),
        *((7200.0, "1", "2"), (7200.0, "3", "workflow/d")),
    }
    assert {wait for _, wait, _ in kept} == {7200.0}


async def test_an_answer_is_heard_though_another_one_beside_it_cannot_be(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes again, alone: as if it had not been seen before."""
    async with running(clock, monkeypatch, waiting=["1"]) as world:
        renewal = await world.renewal()
        for body, correlation_id in (
            ({"status": "KEPT", "owner": "", "held": [], "lost": ["1"]}, renewal.correlation_id),
            ({"status": "LOST", "owner": "spoiled"}, "spoiled#1"),
        ):
            text = json.dumps(body).encode()
            world.client.deliver(Delivery(":lock-replies", text, 1, 1, correlation_id=correlation_id))
        assert [await asyncio.wait_for(world.done.get(), 10) for _ in range(2)] == [1, 1]
        assert [each.reply.lost for each in world.heard] == [["1"]]
