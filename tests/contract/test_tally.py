"""What a ledger counts for those who measure, beside its transitions: each from what is done to a real one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jef_daemon.commits import Commit, Counted, Tally
from jef_daemon.errors import RequestRefused
from jef_daemon.events import Completed, Event, Failed, Launched, Progressed, Retried, Stopped
from jef_daemon.ledger import lock_store, writer
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lock.requests import (
    Acquire,
    Cancel,
    Expire,
    ForceRelease,
    Inspect,
    Keep,
    Release,
    Renew,
    Request,
)
from jef_daemon.lock.state import Mode
from jef_daemon.metrics import DEFINITIONS
from jef_daemon.ports import NOTHING_TO_POLL, Call, Delivery, Refusal
from tests.support.clock import ManualClock
from tests.support.ledgers import LOCK, Life
from tests.support.stored_locks import fresh

WORDS = {one.name: set(one.values) for one in DEFINITIONS}
X = Mode.EXCLUSIVE


class Counting:
    """A ledger's life, and what was counted of it."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.total = Tally()

    def committed(self, commit: Commit) -> None:
        self.total.counts.update(commit.tally.counts)
        self.total.lock_waits += commit.tally.lock_waits
        self.total.grants += commit.tally.grants

    def of(self, what: Counted) -> dict[str, int]:
        """By word."""
        return {word: count for (each, word), count in self.total.counts.items() if each is what}

    @property
    def waits(self) -> list[tuple[str, float]]:
        return [(execution.execution_id, waited_s) for execution, waited_s in self.total.lock_waits]


@pytest.fixture
async def counting(tmp_path: Path) -> AsyncIterator[Counting]:
    life = Life(fresh(tmp_path / "ledger.db"), ManualClock())
    await life.open()
    made = Counting(life)
    life.ledger.on_commit(made.committed)
    yield made
    await life.close()


async def test_notifications_are_counted_by_status(counting: Counting) -> None:
    """Those that are told again to a duplicate as well, and that of a request that never was one."""
    life = counting.life
    await life.run("1", "a", Progressed(progress=1), Completed())
    await life.arrive("1", reply_to="asker")
    error = RequestRefused("field-invalid", "it is wrong", "2")
    await life.ledger.accept([Refusal(error, Delivery("a", b"", 1, 1), "a")])
    await life.ledger.accept([Refusal(RequestRefused("not-json", "no"), Delivery("a", b"", 2, 1), "a")])
    told = Counter(body["status"] for body in await life.told())
    assert told == {"QUEUED": 1, "RUNNING": 2, "COMPLETED": 2, "FAILED": 1}
    assert counting.of(Counted.NOTIFIED) == told


async def test_refused_updates_are_counted_by_reason(counting: Counting) -> None:
    """One word each; those of an attempt that is over are kept out by its fence."""
    life = counting.life
    for name in ("runs", "closed", "done"):
        await life.run(name, "f", Launched())
    await life.arrive("waits", "f")
    await life.fall_silent("closed", close=True)
    assert (await life.update("done", "COMPLETED"))["accepted"]
    refused = [
        await life.update("nobody", "RUNNING", "t"),
        await life.update("runs", "COMPLETED", "another"),
        await life.update("closed", "COMPLETED"),
        await life.update("done", "FAILED"),
        await life.update("waits", "COMPLETED"),
        await life.update("runs", "COMPLETED", jobContextVariables={"x": "y" * 300}),
    ]
    assert not any(answer["accepted"] for answer in refused)
    reasons = ["unknown-execution", "stale-token", "fenced", "finished", "not-running", "too-long"]
    assert counting.of(Counted.UPDATE_REFUSED) == dict.fromkeys(reasons, 1)
    assert set(reasons) < WORDS["jef_updates_refused_total"]
    assert counting.of(Counted.FENCED) == {"update": 2}


async def test_what_an_attempt_that_is_over_writes_is_fenced(counting: Counting) -> None:
    """Its progress, its outcome, its checkpoint, and what its executor said when it was polled."""
    life = counting.life
    await life.run("1", "f", Launched())
    old = Call("poll", life.find("1"), "{}", 1)
    await life.apply("1", Failed(error_type="X", error_message=""), Retried(token="new"))
    await life.claim()
    assert await life.ledger.saving("1", 2, "{}")
    await life.ledger.apply("1", 2, [Progressed(progress=1)])
    for says_nothing in (None, Failed(error_type=NOTHING_TO_POLL, error_message="")):
        await life.ledger.answering(old, says_nothing)
    assert counting.of(Counted.FENCED) == {}
    events: list[Sequence[Event]] = [[Progressed(progress=9)], [Completed()]]
    for each in events:
        await life.ledger.apply("1", 1, each)
    assert not await life.ledger.saving("1", 1, "{}")
    await life.ledger.answering(old, Completed())
    await life.ledger.answering(
        dataclasses.replace(old, name="cancel"), Stopped()
    )  # is stopped, writes nothing
    assert counting.of(Counted.FENCED) == {"progress": 1, "outcome": 1, "checkpoint": 1, "call": 1}
    assert life.status("1") == "RUNNING"
    await life.ledger.apply("1", 2, [Completed()])
    assert not await life.ledger.saving("1", 2, "{}")
    assert counting.of(Counted.FENCED)["checkpoint"] == 2


async def test_waits_for_locks_are_measured_to_the_grant(counting: Counting) -> None:
    """From the answer that one must wait; who is granted at once did not wait."""
    life = counting.life
    await life.arrive("at-once", locks=(LOCK,))
    await life.arrive("waits", locks=(LOCK,), traceparent="a-trace")
    life.clock.time += 5
    await life.grant("at-once")
    await life.wait_for_lock("waits")
    life.clock.time += 20
    await life.wait_for_lock("waits")  # it moved up, and waits on
    life.clock.time += 20
    await life.grant("waits")
    await life.grant("waits")
    assert counting.waits == [("waits", 40.0)]
    assert counting.total.lock_waits[0][0].traceparent == "a-trace"
    # The instant of each grant, also of who did not wait; told once.
    granted = [(execution.execution_id, at - life.clock.time) for execution, at in counting.total.grants]
    assert granted == [("at-once", -40.0), ("waits", 0.0)]
    life.clock.time += 10_000  # no slot came free: given back, and asked for again
    assert await life.ledger.go_on_locking(0.0) == 2
    await life.wait_for_lock("waits")
    life.clock.time += 3
    await life.grant("waits")
    assert counting.waits[1:] == [("waits", 3.0)]


async def test_locks_that_work_outside_loses_are_counted_once(counting: Counting) -> None:
    """What runs here is counted by its worker; who only waits loses nothing that it had."""
    life = counting.life
    for name, action, events in (("out", "f", [Launched()]), ("here", "a", []), ("waits", "a", None)):
        await life.arrive(name, action, locks=((f"r/{name}", "EXCLUSIVE"),))
        if events is None:
            await life.wait_for_lock(name)
            continue
        await life.grant(name)
        await life.claim()
        await life.apply(name, *events)
    asked = {name: f"{name}#{1:09d}" for name in ("out", "here", "waits")}
    for name, correlation_id in asked.items():
        await life.hear(name, "EXPIRED", correlation_id, lost=[f"r/{name}"])
        await life.hear(name, "EXPIRED", correlation_id, lost=[f"r/{name}"])
    assert counting.of(Counted.LOCKS_LOST) == {"": 1}


# --- the lock service ------------------------------------------------------------------------------------


def acquire(owner: str, resource: str, number: int = 1, **more: Any) -> Acquire:
    more = {"reply_to": owner, "correlation_id": f"{owner}#{number}", "locks": ((resource, X),)} | more
    return Acquire(owner=owner, **more)


async def test_requests_for_locks_are_counted_by_their_answer(counting: Counting) -> None:
    """One for each request, whatever else is told with it, and however it is written."""
    where: dict[str, Any] = {"reply_to": "somebody", "correlation_id": "1"}
    steps: list[tuple[Request, str]] = [
        (acquire("a", "x", sole=True, number=5), "granted"),
        (acquire("a", "x", sole=True, number=4), "stale"),
        (acquire("b", "x", lease_s=30.0), "waiting"),
        (acquire("c", "x", wait=False), "refused"),
        (Renew(owner="a", reply_to="a", correlation_id="6"), "renewed"),
        (Renew(owner="nobody", **where), "lost"),
        (Keep(owner="", owners=("a",), lease_s=60.0, wait_lease_s=60.0, sole=True, **where), "kept"),
        (Inspect(owner="a", **where), "state"),
        (Cancel(owner="nobody", **where), "cancelled"),
        (Release(owner="a", reply_to="a", correlation_id="a#6", sole=True), "released"),  # b is granted
        (Release(owner="b", reply_to="b", correlation_id="b#2"), "released"),
        (ForceRelease(resource="x", reason="stuck", by="ann", **where), "released"),
        (acquire("ann", "z", **where), "granted"),
        (
            ForceRelease(resource="z", reason="my own", by="ann", **where),
            "released",
        ),  # REVOKED is told there as well
    ]
    for request, word in steps:
        before = counting.of(Counted.LOCK_REQUEST)
        await counting.life.ledger.deciding([request])
        assert Counter(counting.of(Counted.LOCK_REQUEST)) - Counter(before) == {word: 1}, request
    assert {word for _, word in steps} == WORDS["jef_lock_requests_total"]
    assert counting.of(Counted.FENCED) == {"lock-request": 1, "lock-renewal": 2}
    assert counting.of(Counted.LEASE_EXPIRED) == {}
    owners = ("gone", "nowhere", "ann")
    keep = Keep(owner="", owners=owners, lease_s=60.0, wait_lease_s=60.0, **where)
    await counting.life.ledger.deciding([acquire("ann", "z", number=2), keep])
    assert counting.of(Counted.FENCED) == {"lock-request": 1, "lock-renewal": 4}


async def test_leases_that_nobody_renewed_are_counted(counting: Counting) -> None:
    """Found by the clock, or by the next request of the same owner, which is one request all the same."""
    life = counting.life
    await life.ledger.deciding([acquire("a", "x", lease_s=10.0), acquire("b", "y", lease_s=10.0)])
    await life.ledger.deciding([acquire("w", "x", lease_s=10.0)])
    life.clock.time += 11
    twice = (("y", X), ("y", X))
    await life.ledger.deciding([acquire("b", "y", 2, locks=twice)])
    assert counting.of(Counted.LEASE_EXPIRED) == {"": 1}
    await life.ledger.deciding([Expire()])
    assert counting.of(Counted.LEASE_EXPIRED) == {"": 2}
    assert counting.of(Counted.LOCK_REQUEST) == {"granted": 3, "waiting": 1}


# --- the outbox, and nobody who counts -------------------------------------------------------------------


async def test_the_age_of_the_outbox_is_that_of_its_first_message(counting: Counting) -> None:
    """Across restarts; what is confirmed does not count, and what came behind it does."""
    life = counting.life
    assert (await life.ledger.standing()).outbox_age_s == 0
    await life.arrive("1")
    life.clock.time += 100
    await life.arrive("2")
    life.clock.time += 20
    assert (await life.ledger.standing()).outbox_age_s == 120
    await life.reopen()
    standing = await life.ledger.standing()
    assert (standing.outbox, standing.outbox_age_s) == (2, 120)
    first, second = await life.outbox()
    await life.ledger.confirm([first.id])
    assert (await life.ledger.standing()).outbox_age_s == 20
    await life.ledger.confirm([second.id])
    assert (await life.ledger.standing()).outbox_age_s == 0


async def test_where_nobody_counts_nothing_is_gathered(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTP port is closed: no transaction has a tally."""
    tallies: list[Tally | None] = []

    class Seen(Transaction):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            tallies.append(self._tally)

    looked_at: list[object] = []
    monkeypatch.setattr(writer, "Transaction", Seen)
    monkeypatch.setattr(lock_store, "_count", lambda *given: looked_at.append(given))
    await counting.life.reopen()
    await counting.life.run("1", "a", Completed())
    await counting.life.ledger.deciding([acquire("a", "x")])
    assert len(tallies) > 3
    assert set(map(type, tallies)) == {type(None)}
    assert looked_at == []
    counting.life.ledger.on_commit(counting.committed)
    await counting.life.ledger.deciding([acquire("b", "x")])
    assert type(tallies[-1]) is Tally
    assert len(looked_at) == 1
