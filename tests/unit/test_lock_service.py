"""The lock service, when the clock is set: nothing is decided by leases that have not been moved yet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from jef_daemon.lock.service import LockBus, LockLedger, LockService
from jef_daemon.ports import Delivery, Outgoing, Refusal
from tests.support.clock import ManualClock


class Set(ManualClock):
    """A wall clock that may be set; the other goes on evenly."""

    ahead_s = 0.0

    def now(self) -> float:
        return self.time + self.ahead_s


class Ledger:
    """Moves leases when it is let, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_move = asyncio.Event()
        self.moves = asyncio.Event()

    def deciding(self, requests: Sequence[Any], now: float) -> asyncio.Future[set[str]]:
        self.asked.append("decide")
        decided: asyncio.Future[set[str]] = asyncio.get_running_loop().create_future()
        decided.set_result(set())
        return decided

    async def shift_locks(self, by_s: float) -> None:
        self.moves.set()
        await self.may_move.wait()
        self.asked.append("shift")

    async def take_over_locks(self, grace_s: float) -> None:
        self.asked.append("take over")

    async def accepting(self, messages: Sequence[Refusal]) -> None:
        self.asked += [f"refuse {message.delivery.tag}" for message in messages]


class Faulty(Ledger):
    """Meets a fault at one owner."""

    def deciding(self, requests: Sequence[Any], now: float) -> asyncio.Future[set[str]]:
        if any(request.owner == "o2" for request in requests):
            raise KeyError("a fault")
        return super().deciding(requests, now)


class Bus:
    """Connected."""

    session = 1

    def __init__(self) -> None:
        self.answered: list[str | None] = []

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Nothing comes of it."""

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        self.answered += [message.correlation_id for message in messages]
        return asyncio.get_running_loop().create_future()


def request(number: int) -> Delivery:
    body = b'{"operation": "release", "owner": "o%d"}' % number
    return Delivery("locks", body, number, 1, reply_to="q", correlation_id="c")


async def test_nothing_is_decided_while_leases_are_moved() -> None:
    """A request that comes meanwhile is decided by the new time, and by leases that are of the new time too."""
    clock, ledger = Set(), Ledger()
    service = LockService(cast("LockLedger", ledger), cast("LockBus", Bus()), "jef.", clock=clock)
    await service._take([request(1)])
    assert ledger.asked == ["take over", "decide"]
    clock.ahead_s += 3600
    first, second = (asyncio.create_task(service._take([request(number)])) for number in (2, 3))
    await ledger.moves.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert ledger.asked[2:] == []
    ledger.may_move.set()
    await asyncio.gather(first, second)
    assert ledger.asked[2:] == ["shift", "take over", "decide", "decide"]


async def test_nobody_is_told_twice_where_one_of_a_batch_fails() -> None:
    """The others come again, one by one: also what was refused before the fault was met."""
    ledger, bus = Faulty(), Bus()
    service = LockService(cast("LockLedger", ledger), cast("LockBus", bus), "jef.", clock=ManualClock())
    service.deliver(Delivery("locks", b"{", 1, 1, reply_to="q", correlation_id="wrong"))
    for number in (2, 3):
        service.deliver(request(number))
    running = asyncio.create_task(service._inbox.run())
    async with asyncio.timeout(10):
        await service.finish()
    running.cancel()
    assert ledger.asked == ["take over", "refuse 1", "refuse 2", "decide"]
    assert bus.answered == ["wrong", "c"]
