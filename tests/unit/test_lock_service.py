"""The lock service, when the clock is set: nothing is decided by leases that have not been moved yet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from jef_daemon.lock.service import LockBus, LockLedger, LockService
from jef_daemon.ports import Delivery
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


class Bus:
    """Connected."""

    session = 1

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Nothing comes of it."""


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
