"""What was delivered is taken in order, all that is there at once; what cannot be taken stops nothing but itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import structlog

from jef_daemon.errors import LedgerUnavailable, RequestRefused, TransitionRefused
from jef_daemon.inbox import Inbox
from jef_daemon.ports import Delivery


class Taker:
    """Takes everything but what it cannot, and remembers."""

    def __init__(self, *wrong: int, error: Exception | None = None) -> None:
        self.wrong = set(wrong)
        self.error = error or KeyError("a fault")
        self.batches: list[list[int]] = []
        self.taken: list[int] = []
        self.left_out: list[tuple[int, str]] = []

    async def take(self, batch: Sequence[Delivery]) -> None:
        tags = [delivery.tag for delivery in batch]
        self.batches.append(tags)
        if self.wrong.intersection(tags):
            raise self.error
        self.taken += tags

    async def leave_out(self, delivery: Delivery, error: RequestRefused) -> None:
        self.taken.append(-delivery.tag)
        self.left_out.append((delivery.tag, f"{error.code}: {error.detail}"))


async def taken(taker: Taker, count: int, at_once: int = 500) -> None:
    inbox = Inbox(taker.take, taker.leave_out, at_once)
    for tag in range(1, count + 1):
        inbox.deliver(Delivery("x", b"{}", tag, 1))
    running = asyncio.create_task(inbox.run())
    finishing = asyncio.create_task(inbox.finish())
    await asyncio.wait({running, finishing}, return_when=asyncio.FIRST_COMPLETED)
    running.cancel()
    finishing.cancel()
    await asyncio.wait({running, finishing})
    if not running.cancelled():
        running.result()


async def test_all_that_is_there_is_taken_at_once_but_no_more_than_may_be() -> None:
    taker = Taker()
    await taken(taker, 5, at_once=2)
    assert taker.batches == [[1, 2], [3, 4], [5]]


@pytest.mark.parametrize(
    "error", [KeyError("a fault"), TransitionRefused("1", "QUEUED", "Completed"), ValueError("no \ud800")]
)
async def test_only_what_fails_alone_is_left_out_and_all_stays_in_order(error: Exception) -> None:
    """Acknowledgements count up to a number: whoever was left out comes between the others."""
    taker = Taker(2, 5, error=error)
    await taken(taker, 5)
    assert taker.taken == [1, -2, 3, 4, -5]
    why = f"{type(error).__name__}: {error}".replace("\ud800", "?")
    said = f"message-failed: to take it failed, by a fault of the daemon: {why}"
    assert taker.left_out == [(2, said), (5, said)]


@pytest.mark.parametrize(
    "error", [LedgerUnavailable("no ledger"), ConnectionError("no broker"), MemoryError("no memory")]
)
async def test_what_concerns_all_of_them_is_no_fault_of_one(error: Exception) -> None:
    """Nothing is left out: it will be delivered again, to this daemon or the next."""
    taker = Taker(2, error=error)
    with pytest.raises(type(error)):
        await taken(taker, 3)
    assert (taker.batches, taker.left_out) == ([[1, 2, 3]], [])


async def test_where_all_fail_they_are_tried_slowly_until_one_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not their fault then: somebody has time to look before a queue is one of dead letters."""
    turn, pauses = asyncio.sleep, list[tuple[int, float]]()
    taker = Taker(*range(1, 26), 27)

    async def pause(seconds: float) -> None:
        pauses.append((len(taker.batches), seconds))
        await turn(0)

    monkeypatch.setattr(asyncio, "sleep", pause)
    with structlog.testing.capture_logs() as logs:
        await taken(taker, 27, at_once=1)
    assert taker.taken == [*range(-1, -26, -1), 26, -27]
    assert pauses == [(tried, 5.0) for tried in range(20, 26)]
    assert [entry["in_a_row"] for entry in logs if entry["event"] == "messages_failing"] == [20]
