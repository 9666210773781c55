"""What becomes of the locks of a daemon's own jobs, in the ledger: asked, told, granted, started, given up.

No broker: `Wire` carries the outbox to a lock service and its answers back, when the test says so, or again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from sqlalchemy import Connection, MetaData, Table, insert, select, text

from jef_daemon.events import (
    CancelRequested,
    Completed,
    Event,
    Failed,
    FellSilent,
    GraceEnded,
    Interrupted,
    Launched,
    Retried,
    Stopped,
)
from jef_daemon.ledger import Reader, SqlLedger, schema
from jef_daemon.ledger.claiming import claim
from jef_daemon.ledger.door import accept
from jef_daemon.ledger.lifetime import hand_back
from jef_daemon.ledger.locking import go_on_locking
from jef_daemon.ledger.opening import migrate, open_engine
from jef_daemon.ledger.terms import Terms
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import Execution, Status
from jef_daemon.lock.messages import LockReply
from jef_daemon.lock.requests import Acquire, Cancel, Expire
from jef_daemon.lock.state import Mode
from jef_daemon.messages import timestamp
from jef_daemon.ports import Accepted, Arrival, Capacity, Claimed, Heard, LockTimes, Outgoing
from tests.support.clock import ManualClock
from tests.support.lock_wire import NAMES, Wire
from tests.support.stored_locks import fresh

TIMES = LockTimes(lease_s=120.0, start_within_s=30.0, wait_s=600.0)
X = (("asset/1", "EXCLUSIVE"),)
XY = (("asset/1", "EXCLUSIVE"), ("asset/2", "SHARED"))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return fresh(tmp_path / "ledger.db")


@pytest.fixture
async def ledger(url: str, clock: ManualClock) -> AsyncIterator[SqlLedger]:
    async with SqlLedger(url, NAMES, clock, lock_times=TIMES) as opened:
        yield opened


@pytest.fixture
def wire_(ledger: SqlLedger) -> Wire:
    return Wire(ledger)


def arrival(
    execution_id: str = "1", locks: tuple[tuple[str, str], ...] = X, action: str = "a", **fields: Any
) -> Arrival:
    body = json.dumps({"executionId": execution_id})
    execution = Execution(execution_id, action, token="t", wants_locks=bool(locks), **fields)
    return Arrival(execution, body, locks)


def capacity(total: int = 100, **by_action: int) -> Capacity:
    return Capacity(total, by_action or {"a": total})


def names(claimed: list[Claimed]) -> list[str]:
    return [job.execution.execution_id for job in claimed]


@contextmanager
def looking(url: str) -> Iterator[Connection]:
    engine = open_engine(url, read_only=True)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def row(url: str, execution_id: str = "1") -> Any:
    """What is known of a job's locks."""
    with looking(url) as connection:
        wanted = select(schema.job_locks).where(schema.job_locks.c.execution_id == execution_id)
        return connection.execute(wanted).one()


def answer(status: str, execution_id: str = "1", number: int = 1, **more: Any) -> Heard:
    """What a service says, whoever it is."""
    reply = LockReply.model_validate_json(json.dumps({"status": status, "owner": execution_id, **more}))
    return Heard(reply, f"{execution_id}#{number:09d}")


def granted(clock: ManualClock, execution_id: str = "1", number: int = 1, token: int = 7) -> Heard:
    until = timestamp(clock.time + TIMES.start_lease_s)
    grant = {"resource": "asset/1", "mode": "EXCLUSIVE", "fencingToken": token, "leaseUntil": until}
    return answer("GRANTED", execution_id, number, grants=[grant])


def waiting(position: int = 1, holder: str = "0") -> Heard:
    place: dict[str, Any] = {"resource": "asset/1", "mode": "EXCLUSIVE", "position": position}
    return answer("WAITING", holders=[holder], **place)


# --- asking ------------------------------------------------------------------------------------------------


async def test_a_job_asks_with_the_transaction_that_records_it(ledger: SqlLedger, wire_: Wire) -> None:
    """All its locks in one message, to be answered to this ledger's own queue."""
    await ledger.accept([arrival(locks=XY)])
    await wire_.carry()
    assert wire_.statuses() == ["QUEUED"]
    [request] = wire_.requests
    assert (request.exchange, request.correlation_id) == ("", "1#000000001")
    assert request.reply_to == f"t.lock-replies.{ledger.identity}"
    assert json.loads(request.body) == {
        "operation": "acquire",
        "owner": "1",
        "locks": [
            {"resource": "asset/1", "mode": "EXCLUSIVE"},
            {"resource": "asset/2", "mode": "SHARED"},
        ],
        "leaseSeconds": 60.0,
        "waitLeaseSeconds": 600.0,
        "sole": True,
    }


async def test_a_duplicate_asks_nothing(ledger: SqlLedger, wire_: Wire) -> None:
    assert await ledger.accept([arrival(), arrival()]) == [Accepted.NEW, Accepted.KNOWN]
    assert await ledger.accept([arrival()]) == [Accepted.KNOWN]
    await wire_.carry()
    assert wire_.asked() == ["acquire 1#000000001"]


async def test_a_job_asks_when_its_time_has_come(
    ledger: SqlLedger, wire_: Wire, clock: ManualClock, url: str
) -> None:
    """Before that it stands in nobody's way."""
    await ledger.accept([arrival(not_before=clock.time + 60)])
    clock.time += 59
    await ledger.go_on_locking(0)
    await wire_.carry()
    assert wire_.asked() == []
    clock.time += 1
    await ledger.go_on_locking(0)
    await ledger.go_on_locking(0)
    await wire_.carry()
    assert wire_.asked() == ["acquire 1#000000001"]
    assert row(url).state == "asked"
    await ledger.accept([arrival("2", not_before=clock.time)])
    assert row(url, "2").state == "asked"  # its time had come


async def test_a_new_attempt_says_that_it_waits_though_it_is_where_the_last_one_was(
    ledger: SqlLedger, clock: ManualClock
) -> None:
    """It is QUEUED until then, for whoever looks."""
    await ledger.accept([arrival()])
    await ledger.hearing([waiting(), granted(clock)])
    await ledger.claim(capacity())
    await ledger.apply("1", 1, [Interrupted(token="t2")])
    place: dict[str, Any] = {"resource": "asset/1", "mode": "EXCLUSIVE", "position": 1, "holders": ["0"]}
    await ledger.hearing([answer("WAITING", number=2, **place)])
    told = [json.loads(each.body) for each in await ledger.outbox(0, 99) if each.exchange == NAMES.status]
    assert (told[-1]["status"], told[-1]["attempt"], told[-1]["waitingFor"]) == ("WAITING_FOR_LOCK", 2, place)


async def test_what_was_not_heard_is_asked_again(ledger: SqlLedger, wire_: Wire, clock: ManualClock) -> None:
    """Once the service has answered something later; then it is as if asked now."""
    await ledger.accept([arrival("1")])
    clock.time += 10
    await ledger.accept([arrival("2")])
    await ledger.go_on_locking(clock.time - 10.001)
    await wire_.carry()
    assert len(wire_.requests) == 2
    await ledger.go_on_locking(clock.time - 10)
    await ledger.go_on_locking(clock.time - 10)
    await wire_.carry()
    assert wire_.asked()[2:] == ["acquire 1#000000001"]


# --- what is answered: every state, every answer -------------------------------------------------------------

STATES = ("later", "asked", "waiting", "granted", "held", "lost", "released")
ANSWERS: dict[str, dict[str, Any]] = {
    "GRANTED": {},
    "WAITING": {"resource": "asset/1", "mode": "EXCLUSIVE", "position": 3, "holders": ["9"]},
    "REFUSED limit": {"code": "limit", "reason": "65 resources in one request; the limit is 64"},
    "REFUSED elsewhere": {"code": "elsewhere", "reason": "elsewhere"},
    "EXPIRED": {"lost": ["asset/1"], "reason": "the lease ended"},
    "REVOKED": {"lost": ["asset/1"], "reason": "released by force by ann: stuck"},
    "CANCELLED": {"reason": "cancelled"},
    "KEPT held": {"held": ["1"]},
    "KEPT lost": {"lost": ["1"]},
    "KEPT neither": {},
    "RELEASED": {},
    "STATE": {"resources": []},
    "NEW ONE": {},
}
GONE = ("EXPIRED", "REVOKED", "CANCELLED")
MOVES: dict[tuple[str, str], tuple[str, int, list[str]]] = {
    **{(state, "GRANTED"): ("granted", 1, []) for state in ("asked", "waiting")},
    **{(state, "WAITING"): ("waiting", 1, ["WAITING_FOR_LOCK"]) for state in ("asked", "waiting")},
    **{(s, "REFUSED limit"): ("released", 2, ["RUNNING", "FAILED"]) for s in ("asked", "waiting")},
    **{(s, "REFUSED elsewhere"): ("later", 1, ["WAITING_FOR_LOCK"]) for s in ("asked", "waiting")},
    **{(state, gone): ("asked", 2, []) for state in ("asked", "waiting", "granted") for gone in GONE},
    **{("held", gone): ("lost", 1, []) for gone in GONE},
    **{(state, "KEPT lost"): ("asked", 2, []) for state in ("waiting", "granted")},
    ("held", "KEPT lost"): ("lost", 1, []),
    ("waiting", "KEPT held"): ("asked", 1, []),
}
"""(state, answer) → state, number of the request, statuses told. What is not here changes nothing."""


async def reach(state: str, ledger: SqlLedger, clock: ManualClock) -> None:
    """Bring job 1 there, by the shortest way."""
    await ledger.accept([arrival(not_before=clock.time + 9 if state == "later" else None)])
    if state in {"later", "asked"}:
        return
    await ledger.hearing([waiting()])
    if state == "waiting":
        return
    await ledger.hearing([granted(clock)])
    if state == "granted":
        return
    await ledger.claim(capacity())
    if state == "lost":
        await ledger.hearing([answer("EXPIRED", lost=["asset/1"])])
    if state == "released":
        await ledger.apply("1", 1, [Completed()])


@pytest.mark.parametrize("said", ANSWERS)
@pytest.mark.parametrize("state", STATES)
async def test_every_answer_in_every_state(
    ledger: SqlLedger, wire_: Wire, clock: ManualClock, url: str, state: str, said: str
) -> None:
    """By `MOVES`; a second time it changes nothing more."""
    await reach(state, ledger, clock)
    await wire_.carry()
    before, told, asked = row(url), len(wire_.told), len(wire_.requests)
    assert before.state == state
    one = granted(clock) if said == "GRANTED" else answer(said.split(maxsplit=1)[0], **ANSWERS[said])
    lost = await ledger.hearing([one])
    await wire_.carry()
    expected = MOVES.get((state, said))
    if expected is None:
        assert (row(url), lost, len(wire_.told), len(wire_.requests)) == (before, [], told, asked)
        return
    after = row(url)
    assert (after.state, after.number, [each["status"] for each in wire_.told[told:]]) == expected
    assert [each.execution_id for each in lost] == (["1"] if after.state == "lost" else [])
    told, asked = len(wire_.told), len(wire_.requests)
    assert await ledger.hearing([one]) == []
    await wire_.carry()
    assert (row(url), len(wire_.told), len(wire_.requests)) == (after, told, asked)


async def test_an_answer_to_an_earlier_request_changes_nothing(
    ledger: SqlLedger, wire_: Wire, clock: ManualClock, url: str
) -> None:
    """A grant that an operator took away before the daemon heard of it is none, however often it is told."""
    await ledger.accept([arrival()])
    await ledger.hearing([granted(clock), answer("REVOKED", lost=["asset/1"])])
    asked = row(url)
    assert (asked.state, asked.number) == ("asked", 2)
    await ledger.hearing([granted(clock), waiting(), answer("REFUSED", code="limit"), answer("EXPIRED")])
    assert row(url) == asked
    assert await ledger.claim(capacity()) == []
    await ledger.hearing([granted(clock, number=2, token=8)])
    [job] = await ledger.claim(capacity())
    assert job.grants == (("asset/1", "EXCLUSIVE", 8),)
    assert await ledger.hearing([answer("EXPIRED", lost=["asset/1"])]) == []
    assert row(url).state == "held"


async def test_an_answer_about_nobody_we_know_changes_nothing(ledger: SqlLedger, wire_: Wire) -> None:
    assert await ledger.hearing([answer("EXPIRED", "9"), answer("KEPT", "", lost=["8"], held=["7"])]) == []
    await wire_.carry()
    assert (wire_.requests, wire_.told) == ([], [])


async def test_where_they_stand_is_told_to_the_first_who_listen(ledger: SqlLedger) -> None:
    """When the queue of a resource has moved; others ask by themselves."""
    locks = (("asset/1", Mode.EXCLUSIVE),)
    acquires = [
        Acquire(owner=owner, locks=locks, lease_s=60.0, reply_to=to, correlation_id=owner)
        for owner, to in [("a", "t.a"), ("b", "t.b"), ("c", "elsewhere"), ("d", "t.d"), ("e", "t.e")]
    ]
    assert await ledger.deciding(acquires) == set()
    assert await ledger.deciding([Cancel(owner="b")]) == {"asset/1"}
    before = await ledger.outbox(0, 99)
    await ledger.tell_places(["asset/1"], "t.", 2)
    told = await ledger.outbox(before[-1].id, 99)
    assert [(each.routing_key, each.correlation_id) for each in told] == [("t.d", "d")]
    place = json.loads(told[0].body)
    assert (place["status"], place["position"], place["holders"]) == ("WAITING", 2, ["a"])


async def test_what_becomes_of_locks_is_in_the_history(
    ledger: SqlLedger, clock: ManualClock, url: str
) -> None:
    """In the name of the lock service, with the numbers of what is granted and why it is gone."""
    await ledger.accept([arrival()])
    await ledger.hearing([waiting()])
    await ledger.hearing([granted(clock)])
    await ledger.hearing([answer("REVOKED", lost=["asset/1"], reason="stuck")])
    await ledger.hearing([answer("REFUSED", number=2, reason="no")])
    entries = Reader(url).history("1")[1:]
    assert {entry.actor for entry in entries} == {"locks"}
    assert [(entry.event, entry.reason) for entry in entries] == [
        *(("LockAwaited", ""), ("LockGranted", ""), ("LockLost", "asset/1: stuck; asked for again")),
        *(("Started", ""), ("Failed", "")),
    ]
    assert entries[1].detail == {"grants": [["asset/1", "EXCLUSIVE", 7]]}


async def test_of_several_locks_the_first_lease_that_ends_counts(
    ledger: SqlLedger, clock: ManualClock, url: str
) -> None:
    """So long a job may wait for its slot."""
    await ledger.accept([arrival(locks=XY)])
    grants = [
        {"resource": each, "mode": mode, "fencingToken": 1, "leaseUntil": timestamp(clock.time + lease_s)}
        for (each, mode), lease_s in zip(XY, (90, 60), strict=True)
    ]
    await ledger.hearing([answer("GRANTED", grants=grants)])
    assert row(url).at == clock.time + 60 - TIMES.margin_s


async def test_whose_grant_is_taken_away_waits_for_locks_again(
    ledger: SqlLedger, clock: ManualClock, url: str
) -> None:
    """By the clock of that wait, from now on; not by that of the wait for a slot."""
    await ledger.accept([arrival(lock_timeout_s=40.0, queue_timeout_s=5.0)])
    await ledger.hearing([granted(clock)])
    assert Reader(url).find("1").due_at == clock.time + 5
    clock.time += 3
    await ledger.hearing([answer("EXPIRED", lost=["asset/1"])])
    assert Reader(url).find("1").due_at == clock.time + 40


@pytest.mark.parametrize("is_failure", [True, False])
async def test_work_outside_that_lost_its_locks_fails_where_that_is_wanted(
    url: str, clock: ManualClock, is_failure: bool
) -> None:
    """Else it is told in the history only, and goes on."""
    async with SqlLedger(url, NAMES, clock, lock_times=TIMES, lost_locks_fail=is_failure) as ledger:
        await ledger.accept([arrival()])
        await ledger.hearing([granted(clock)])
        await ledger.claim(capacity())
        await ledger.apply("1", 1, [Launched()])
        assert await ledger.hearing([answer("REVOKED", lost=["asset/1"], reason="stuck")]) == []
        await ledger.go_on_locking(0)
        lost = [(entry.event, entry.reason) for entry in Reader(url).history("1")[-2:]]
        assert (("LockLost", "asset/1: stuck") in lost) is True
        assert Reader(url).find("1").status is (Status.FAILED if is_failure else Status.RUNNING)


async def test_who_asks_again_says_where_it_stands(
    ledger: SqlLedger, clock: ManualClock, wire_: Wire
) -> None:
    """First in the queue behind itself, where another daemon has the same job; first, where no slot came free."""
    await ledger.accept([arrival()])
    await ledger.hearing([answer("REFUSED", code="elsewhere", reason="elsewhere")])
    await wire_.carry()
    place = {"resource": "asset/1", "mode": "EXCLUSIVE", "position": 1}
    assert wire_.told[-1]["waitingFor"] == {**place, "holders": ["1"]}
    assert wire_.told[-1]["message"] == "another daemon has the same execution, with its locks"
    clock.time += 3
    await ledger.go_on_locking(0)
    await ledger.hearing([granted(clock)])
    clock.time += 30
    assert await ledger.go_on_locking(0) == 1
    await wire_.carry()
    assert wire_.told[-1]["waitingFor"] == {**place, "holders": []}
    assert "no slot came free within 30 s" in wire_.told[-1]["message"]


async def test_a_grant_of_nothing_changes_nothing(ledger: SqlLedger, clock: ManualClock, url: str) -> None:
    """Whoever may publish can forge it; it must not end the role, and come again after each start."""
    await ledger.accept([arrival()])
    assert await ledger.hearing([answer("GRANTED"), answer("GRANTED", grants=[])]) == []
    assert row(url).state == "asked"


async def test_a_place_is_told_when_it_changes(ledger: SqlLedger, wire_: Wire) -> None:
    """Not with every answer."""
    await ledger.accept([arrival()])
    for position, holder in ((2, "0"), (2, "0"), (1, "0"), (1, "8")):
        await ledger.hearing([waiting(position, holder)])
    await ledger.hearing([answer("WAITING")])  # to a renewal: no place
    await wire_.carry()
    places = [each["waitingFor"] for each in wire_.told if each["status"] == "WAITING_FOR_LOCK"]
    assert [(place["position"], place["holders"]) for place in places] == [(2, ["0"]), (1, ["0"]), (1, ["8"])]
    assert places[0]["resource"] == "asset/1"


async def test_a_refusal_fails_the_job_with_the_services_sentence(ledger: SqlLedger, wire_: Wire) -> None:
    """And releases, in case."""
    await ledger.accept([arrival()])
    await ledger.hearing([answer("REFUSED", code="limit", reason="70 resources; the limit is 64")])
    await wire_.carry()
    error = wire_.told[-1]["error"]
    assert (error["type"], error["message"]) == ("LockRefused", "70 resources; the limit is 64")
    assert wire_.asked() == ["acquire 1#000000001", "release 1#000000001"]
    assert await ledger.claim(capacity()) == []


async def test_one_of_several_locks_is_taken_away_before_the_start(wire_: Wire, url: str) -> None:
    """The others are given up too and all are asked for anew: to keep them would be refused."""
    ledger = wire_.service
    await ledger.accept([arrival(locks=XY)])
    await wire_.settle()
    assert row(url).state == "granted"
    body = {"operation": "force-release", "locks": [{"resource": "asset/2"}], "reason": "stuck"}
    await wire_.repeat(Outgoing(0, "", NAMES.locks, json.dumps(body).encode()))
    await wire_.settle()
    assert row(url).state == "granted"
    [job] = await ledger.claim(capacity())
    assert job.grants == (("asset/1", "EXCLUSIVE", 2), ("asset/2", "SHARED", 2))
    assert wire_.statuses()[-1] != "FAILED"


# --- starting ----------------------------------------------------------------------------------------------


async def test_granted_jobs_start_before_queued_ones(ledger: SqlLedger, clock: ManualClock) -> None:
    """Others wait for what they hold; among them by priority, then age."""
    await ledger.accept([arrival("q", (), priority=9), arrival("1"), arrival("2", priority=1)])
    await ledger.hearing([granted(clock, "1"), granted(clock, "2")])
    assert names(await ledger.claim(capacity(2))) == ["2", "1"]
    assert names(await ledger.claim(capacity(2))) == ["q"]


async def test_granted_and_queued_jobs_share_the_places_of_their_action(
    ledger: SqlLedger, clock: ManualClock
) -> None:
    """An action's limit is one limit, and so are the processes."""
    await ledger.accept([arrival("q", ()), arrival("1"), arrival("b", (), "b")])
    await ledger.hearing([granted(clock)])
    assert names(await ledger.claim(capacity(9, a=1))) == ["1"]
    await ledger.accept([arrival("2")])
    await ledger.hearing([granted(clock, "2")])
    one_process = Capacity(9, {"a": 5, "b": 5}, 1, frozenset({"a", "b"}))
    assert names(await ledger.claim(one_process)) == ["2"]
    assert names(await ledger.claim(capacity(9, b=5))) == ["b"]


async def test_a_job_is_told_its_fencing_tokens_and_never_started_twice(wire_: Wire, url: str) -> None:
    ledger = wire_.service
    await ledger.accept([arrival(locks=XY)])
    await wire_.settle()
    [job] = await ledger.claim(capacity())
    assert job.grants == (("asset/1", "EXCLUSIVE", 1), ("asset/2", "SHARED", 1))
    assert await ledger.claim(capacity()) == []
    assert row(url).state == "held"
    await wire_.carry()
    assert wire_.statuses() == ["QUEUED", "RUNNING"]


async def test_a_grant_that_is_nearly_over_starts_nothing(
    ledger: SqlLedger, clock: ManualClock, url: str
) -> None:
    """There must be time for the first renewal."""
    await ledger.accept([arrival()])
    await ledger.hearing([granted(clock)])
    clock.time += TIMES.start_within_s
    assert await ledger.claim(capacity()) == []
    assert row(url).at == pytest.approx(clock.time, abs=0.001)


async def test_locks_that_no_slot_came_for_are_given_back(wire_: Wire, clock: ManualClock, url: str) -> None:
    """To those who wait; asked for again behind them, told, and in the history."""
    ledger = wire_.service
    await ledger.accept([arrival("1"), arrival("2")])
    await wire_.settle()
    clock.time += TIMES.start_within_s - 0.01
    assert await ledger.go_on_locking(0) == 0
    clock.time += 0.02
    assert await ledger.go_on_locking(0) == 1
    assert await ledger.go_on_locking(0) == 0
    await wire_.settle()
    assert wire_.asked()[2:] == ["release 1#000000001", "acquire 1#000000002"]
    assert wire_.statuses("1") == ["QUEUED", "WAITING_FOR_LOCK", "WAITING_FOR_LOCK"]
    assert names(await ledger.claim(capacity())) == ["2"]
    events = [(line.event, line.actor) for line in Reader(url).history("1")]
    assert ("LockGivenBack", "locks") in events
    assert [row(url, "1").state, row(url, "2").state] == ["waiting", "held"]


async def test_a_repeated_release_does_not_undo_what_was_asked_for_after_it(
    wire_: Wire, clock: ManualClock
) -> None:
    """A daemon that lost the broker's confirmation sends release and request again; the job runs meanwhile."""
    ledger = wire_.service
    await ledger.accept([arrival("1")])
    await wire_.settle()
    clock.time += TIMES.start_within_s
    assert await ledger.go_on_locking(0) == 1
    await wire_.settle()
    [job] = await ledger.claim(capacity())
    assert job.grants == (("asset/1", "EXCLUSIVE", 2),)
    await ledger.accept([arrival("2")])
    await wire_.settle()
    await wire_.repeat(*wire_.requests)
    await wire_.settle()
    assert await ledger.claim(capacity()) == [], "two hold one lock"
    assert wire_.statuses("2") == ["QUEUED", "WAITING_FOR_LOCK"]


# --- ending ------------------------------------------------------------------------------------------------

RELEASE, AGAIN = "release 1#000000001", "acquire 1#000000002"
FAILED = Failed(error_type="E", error_message="m")
ENDS: list[tuple[list[Event], list[str]]] = [
    ([Completed()], [RELEASE]),
    ([FAILED], [RELEASE]),
    ([CancelRequested()], []),
    ([CancelRequested(), Stopped()], [RELEASE]),
    ([FellSilent()], []),
    ([FellSilent(), GraceEnded()], [RELEASE]),
    ([FellSilent(), Completed()], [RELEASE]),
    ([FellSilent(), CancelRequested()], [RELEASE]),
    ([Interrupted(token="u")], [RELEASE, AGAIN]),
    ([FellSilent(), Retried(token="u")], [RELEASE, AGAIN]),
    ([FAILED, Retried(token="u")], [RELEASE, AGAIN]),
    ([FellSilent(), GraceEnded(), Retried(token="u")], [RELEASE, AGAIN]),
    ([FAILED, Retried(token="u", not_before=2e9)], [RELEASE]),
    ([FellSilent(), Retried(token="u", not_before=2e9)], [RELEASE]),
]


def described(events: list[Event]) -> str:
    return ", ".join(type(event).__name__ for event in events)


@pytest.mark.parametrize(("events", "asked"), ENDS, ids=[described(events) for events, _ in ENDS])
async def test_a_running_job_releases_with_its_end(
    ledger: SqlLedger, wire_: Wire, clock: ManualClock, events: list[Event], asked: list[str]
) -> None:
    """One event per transaction; a new attempt asks anew behind the release, or when its time has come."""
    await reach("held", ledger, clock)
    for event in events:
        await ledger.apply("1", None, [event])
    await wire_.carry()
    assert wire_.asked()[1:] == asked


@pytest.mark.parametrize("state", ["asked", "waiting", "granted"])
async def test_a_cancelled_job_leaves_the_queue(
    ledger: SqlLedger, wire_: Wire, clock: ManualClock, url: str, state: str
) -> None:
    """Whatever it had, at once; what the service still says of it changes nothing."""
    await reach(state, ledger, clock)
    await ledger.apply("1", None, [CancelRequested()])
    await wire_.carry()
    assert wire_.asked() == ["acquire 1#000000001", "release 1#000000001"]
    await ledger.hearing([granted(clock)])
    assert await ledger.claim(capacity()) == []
    assert row(url).state == "released"


async def test_a_job_that_never_asked_has_nothing_to_release(
    ledger: SqlLedger, wire_: Wire, clock: ManualClock
) -> None:
    await reach("later", ledger, clock)
    await ledger.apply("1", None, [CancelRequested()])
    clock.time += 10
    await ledger.go_on_locking(clock.time)
    await wire_.carry()
    assert wire_.asked() == []


@pytest.mark.parametrize("again", [True, False])
async def test_after_the_daemons_death_running_jobs_give_up_their_locks(
    wire_: Wire, url: str, again: bool
) -> None:
    """Those that may run again ask anew, for a new attempt; the others are over."""
    ledger = wire_.service
    await ledger.accept([arrival("1"), arrival("2")])
    await wire_.settle()
    assert names(await ledger.claim(capacity())) == ["1"]
    assert await ledger.interrupt(lambda action: again, "died") == 1
    await wire_.settle()
    assert names(await ledger.claim(capacity())) == ["2"]
    assert row(url, "1").state == ("waiting" if again else "released")
    assert row(url, "1").attempt == (2 if again else 1)


async def test_waiting_and_granted_jobs_go_on_after_a_restart(url: str, clock: ManualClock) -> None:
    """Their rows are all there is; the ledger keeps its name, so the answers find it."""
    async with SqlLedger(url, NAMES, clock, lock_times=TIMES) as first:
        identity = first.identity
        wire_ = Wire(first)
        await first.accept([arrival("1"), arrival("2"), arrival("3", (("asset/3", "SHARED"),))])
        await wire_.settle()
        assert names(await first.claim(capacity(1))) == ["1"]
    async with SqlLedger(url, NAMES, clock, lock_times=TIMES) as second:
        assert second.identity == identity
        assert await second.lock_states("waiting") == ["2"]
        assert names(await second.claim(capacity())) == ["3"]
        await second.apply("1", 1, [Completed()])
        await Wire(second).settle()
        assert names(await second.claim(capacity())) == ["2"]


async def test_locks_that_are_lost_while_work_is_launched_fail_it(
    ledger: SqlLedger, clock: ManualClock, url: str
) -> None:
    """The launch was on its way into the ledger: whoever ran the attempt here had nothing to stop any more."""
    await reach("lost", ledger, clock)
    await ledger.go_on_locking(0)
    assert row(url).state == "lost"  # it runs here: that is the worker's
    await ledger.apply("1", 1, [Launched()])
    await ledger.go_on_locking(0)
    assert row(url).state == "released"
    [applied] = await ledger.apply("1", 1, [Completed()])
    assert "FAILED" in applied.refused


# --- going to another daemon and back -------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["later", "asked", "waiting", "granted"])
async def test_a_job_that_is_handed_back_gives_up_first(
    ledger: SqlLedger, wire_: Wire, clock: ManualClock, url: str, state: str
) -> None:
    """Before the request leaves: whoever takes it asks for the same locks."""
    await reach(state, ledger, clock)
    assert await ledger.hand_back() == 1
    await ledger.hearing([granted(clock)])
    clock.time += 1000
    await ledger.go_on_locking(clock.time)
    assert await ledger.claim(capacity()) == []
    await wire_.carry()
    assert wire_.log == (
        ["job 1"] if state == "later" else ["acquire 1#000000001", "release 1#000000001", "job 1"]
    )
    assert row(url).state == "released"


async def test_a_job_that_is_handed_back_in_its_interruptions_transaction_asks_for_nothing(
    ledger: SqlLedger, wire_: Wire, clock: ManualClock, url: str
) -> None:
    """Else the locks would go to a daemon that has not got the job any more, and never come free."""
    await reach("granted", ledger, clock)
    await ledger.claim(capacity())

    def stop(transaction: Transaction) -> int:
        transaction.apply([("1", 1, [Interrupted(token="t2")])])
        return hand_back(transaction)

    assert await ledger._other(stop) == 1
    await wire_.carry()
    assert wire_.log[1:] == [
        "release 1#000000001",
        "acquire 1#000000002",
        "release 1#000000002",
        "job 1",
    ]
    assert row(url).state == "released"


async def test_a_job_that_comes_back_asks_anew(wire_: Wire, url: str) -> None:
    """And the release that is repeated later does not take that away."""
    ledger = wire_.service
    await ledger.accept([arrival()])
    await wire_.settle()
    assert await ledger.hand_back() == 1
    assert await ledger.accept([arrival(sequence=4)]) == [Accepted.TAKEN_AGAIN]
    await wire_.settle()
    assert wire_.asked()[1:] == ["release 1#000000001", "acquire 1#000000002"]
    await wire_.repeat(*wire_.requests[:2])
    assert names(await ledger.claim(capacity())) == ["1"]
    with looking(url) as connection:
        held = connection.execute(select(schema.lock_grants.c.owner, schema.lock_grants.c.fencing_token))
        assert [tuple(each) for each in held] == [("1", 2)]


async def test_an_execution_at_two_daemons_runs_at_one_at_a_time(
    ledger: SqlLedger, clock: ManualClock, tmp_path: Path
) -> None:
    """The second waits until the first has ended, asks again by itself, and is told why."""
    other_url = f"sqlite:///{tmp_path / 'other.db'}"
    async with SqlLedger(other_url, NAMES, clock, lock_times=TIMES) as other:
        wire_ = Wire(ledger, other)
        await ledger.accept([arrival()])
        await wire_.settle()
        await other.accept([arrival()])
        await wire_.settle()
        assert (names(await ledger.claim(capacity())), await other.claim(capacity())) == (["1"], [])
        [waits] = [each for each in wire_.told if each["status"] == "WAITING_FOR_LOCK"]
        assert waits["waitingFor"]["holders"] == ["1"]
        assert waits["message"] == "another daemon has the same execution, with its locks"
        clock.time += 2.9
        await other.go_on_locking(0)
        await wire_.carry()
        assert len(wire_.requests) == 2
        clock.time += 0.1
        await other.go_on_locking(0)
        await wire_.settle()
        assert await other.claim(capacity()) == []
        await ledger.apply("1", 1, [Completed()])
        clock.time += 3
        await other.go_on_locking(0)
        await wire_.settle()
        assert names(await other.claim(capacity())) == ["1"]


async def test_purged_jobs_leave_no_row(ledger: SqlLedger, clock: ManualClock, url: str) -> None:
    await reach("released", ledger, clock)
    clock.time += 100
    assert await ledger.purge(clock.time, 10) == 1
    with looking(url) as connection:
        assert connection.execute(select(schema.job_locks)).all() == []


async def test_a_lease_that_ends_at_the_service_is_heard_by_the_daemon(
    wire_: Wire, clock: ManualClock, url: str
) -> None:
    """Over the real answers: EXPIRED names the resource, the running attempt is lost."""
    ledger = wire_.service
    await ledger.accept([arrival()])
    await wire_.settle()
    await ledger.claim(capacity())
    clock.time += TIMES.start_lease_s
    await ledger.deciding([Expire()])
    [lost] = await wire_.hear()
    assert (lost.execution_id, lost.attempt) == ("1", 1)
    assert lost.reason == "asset/1: the lease ended"
    assert Reader(url).history("1")[-1].event == "LockLost"


# --- many ----------------------------------------------------------------------------------------------------

MANY = 100_000


class Steps:
    """Counts the steps of SQLite's machine: what a statement costs, without a clock."""

    def __init__(self, connection: Connection) -> None:
        self._connection: sqlite3.Connection = connection.connection.dbapi_connection  # type: ignore[assignment]
        self.count = 0

    def __enter__(self) -> Self:
        self._connection.set_progress_handler(self._step, 10)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.set_progress_handler(None, 0)

    def _step(self) -> int:
        self.count += 1
        return 0


def fill(connection: Connection, count: int) -> None:
    """Executions of one action that wait for one lock: copies, so that they are there soon."""
    execution = Execution("0", "a", token="t", wants_locks=True, status=Status.WAITING_FOR_LOCK)
    lock = {"action": "a", "attempt": 1, "number": 1, "locks": json.dumps(X), "state": "waiting", "at": 1.0}
    first: list[tuple[Table, dict[str, Any]]] = [
        (schema.executions, {name: getattr(execution, name) for name in Execution.__slots__}),
        (schema.requests, {"execution_id": "0", "body": "{}"}),
        (schema.job_locks, {"execution_id": "0"} | lock),
    ]
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)"
    for table, values in first:
        connection.execute(insert(table).values(**values))
        rest = ", ".join(f'"{name}"' for name in values if name != "execution_id")
        statement = (
            f"INSERT INTO {table.name} (execution_id, {rest}) {numbers} "
            f"SELECT 'w' || i, {rest} FROM {table.name}, n WHERE execution_id = '0'"
        )
        connection.execute(text(statement), {"count": count})


def cost(url: str, waiting_jobs: int) -> tuple[int, int]:
    """Steps of a claim that starts 20 jobs, and of a look at what is due, with so many waiting."""
    engine = open_engine(url)
    with engine.begin() as connection:
        if waiting_jobs:
            fill(connection, waiting_jobs)
        transaction = Transaction(connection, Terms(NAMES, identity="i"), 5e8, 1)
        accept(transaction, [arrival(f"q{number}", ()) for number in range(20)])
        accept(transaction, [arrival(f"l{number}", (("free", "SHARED"),)) for number in range(3)])
        transaction.finish()
        with Steps(connection) as claiming:
            assert len(claim(transaction, capacity(50))) == 20
        with Steps(connection) as going_on:
            go_on_locking(transaction, 1.0)
    engine.dispose()
    return claiming.count, going_on.count


def test_those_that_wait_do_not_slow_those_that_start(tmp_path: Path) -> None:
    """A claim and a look at what is due cost the same with 100,000 waiting jobs of the same action."""
    few = cost(fresh(tmp_path / "few.db"), 0)
    many = cost(fresh(tmp_path / "many.db"), MANY)
    assert few[0] > 0
    assert many[0] <= few[0] * 1.2 + 5
    assert many[1] <= few[1] * 1.2 + 5


# --- an older ledger -----------------------------------------------------------------------------------------


def older(path: Path) -> None:
    """A ledger of the version before locks, with jobs in it."""
    from alembic import command
    from alembic.config import Config

    from jef_daemon.ledger import opening

    engine = open_engine(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(Path(opening.__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        executions = Table("executions", MetaData(), autoload_with=connection)
        for number, (status, wants, back) in enumerate(
            [
                ("QUEUED", True, False),
                ("WAITING_FOR_LOCK", True, False),
                ("QUEUED", True, True),
                ("COMPLETED", True, False),
                ("QUEUED", False, False),
            ]
        ):
            execution = Execution(str(number), "a", token="t", attempt=2, wants_locks=wants, handed_back=back)
            columns = {column.name for column in executions.columns} - {"number"}  # as they were then
            values = {name: getattr(execution, name) for name in columns} | {"status": status}
            body = {"executionId": str(number), "locks": [{"resource": "asset/1", "mode": "EXCLUSIVE"}]}
            connection.execute(insert(executions).values(**values))
            connection.execute(
                insert(schema.requests).values(execution_id=str(number), body=json.dumps(body))
            )
    engine.dispose()


async def test_an_older_ledgers_jobs_ask_for_their_locks(tmp_path: Path, clock: ManualClock) -> None:
    """As soon as the daemon runs; those that ended, left or want none do not."""
    older(tmp_path / "ledger.db")
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    async with SqlLedger(url, NAMES, clock, lock_times=TIMES) as ledger:
        wire_ = Wire(ledger)
        await ledger.go_on_locking(0)
        await wire_.settle()
        assert wire_.asked() == ["acquire 0#000000001", "acquire 1#000000001"]
        assert names(await ledger.claim(capacity())) == ["0", "4"]
        await ledger.apply("0", 2, [Completed()])
        await wire_.settle()
        assert names(await ledger.claim(capacity())) == ["1"]


def test_a_migrated_ledger_has_the_indexes_of_the_schema(tmp_path: Path) -> None:
    """With their order and their conditions, which comparing the metadata does not see."""
    older(tmp_path / "old.db")
    described = []
    for name, make in (("old.db", migrate), ("new.db", schema.metadata.create_all)):
        engine = open_engine(f"sqlite:///{tmp_path / name}")
        make(engine)
        with engine.connect() as connection:
            wanted = "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql NOT NULL ORDER BY name"
            described.append(connection.exec_driver_sql(wanted).scalars().all())
        engine.dispose()
    assert described[0] == described[1]
    assert any("lock_wants_blocked" in each and "WHERE blocked" in each for each in described[0])
