"""What every ledger promises of clocks that run out: silence, waits, limits, grace. Time is moved by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from jef_daemon.events import Completed, Failed, Launched, Progressed
from jef_daemon.ledger import Policy, Reader, SqlLedger
from jef_daemon.ledger.purging import count_finished
from jef_daemon.lifecycle import Execution
from jef_daemon.lock.messages import LockReply
from jef_daemon.messages import Update, timestamp
from jef_daemon.names import WATCHED, Names
from jef_daemon.ports import Arrival, Capacity, Consequences, Heard, Outgoing, Reported
from jef_daemon.retry import RetryPolicy
from tests.support.clock import ManualClock

LOCKS = (("asset/42", "EXCLUSIVE"),)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
async def ledger(url: str, clock: ManualClock) -> AsyncIterator[SqlLedger]:
    async with SqlLedger(url, Names("t"), clock) as opened:
        opened.govern({"a": Policy(hooks=frozenset({"cancel"}))})
        yield opened


async def queued(ledger: SqlLedger, name: str, **fields: Any) -> None:
    """A request that waits."""
    locks = LOCKS if fields.get("wants_locks") else ()
    body = json.dumps({"executionId": name})
    await ledger.accept([Arrival(Execution(name, "a", token="t", **fields), body, locks)])


async def running(ledger: SqlLedger, name: str = "1", **fields: Any) -> None:
    """A job that runs, silent from now on."""
    await queued(ledger, name, **{"update_timeout_s": 10.0} | fields)
    assert await ledger.claim(Capacity(1, {"a": 1}))


async def outside(ledger: SqlLedger, name: str = "1", **fields: Any) -> None:
    """A job whose work runs outside."""
    await running(ledger, name, **fields)
    await ledger.apply(name, 1, [Launched(external_id=f"x-{name}")])


def _body(message: Outgoing) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(message.body)
    return body


async def told(ledger: SqlLedger, name: str = "1") -> list[dict[str, Any]]:
    found = [_body(message) for message in await status(ledger)]
    return [each for each in found if each["executionId"] == name]


async def status(ledger: SqlLedger) -> list[Outgoing]:
    return [message for message in await ledger.outbox(0, 1000) if message.exchange == "t.status"]


async def statuses(ledger: SqlLedger, name: str = "1") -> list[str]:
    return [each["status"] for each in await told(ledger, name)]


async def flag(ledger: SqlLedger, clock: ManualClock, *names: str) -> int:
    return len((await ledger.fall_silent(names or ("1",), clock.time)).lateness_s)


async def run_out(ledger: SqlLedger, clock: ManualClock) -> Consequences:
    return await ledger.run_out(clock.time, 100)


def updated(what: str = "RUNNING", token: str = "t", name: str = "1", **more: Any) -> list[Reported]:
    body = {"executionId": name, "token": token, "status": what, **more}
    return [Reported(Update.model_validate_json(json.dumps(body)))]


async def update(ledger: SqlLedger, what: str = "RUNNING", **more: Any) -> bool:
    [answer], _ = await ledger.updating(updated(what, **more))
    return bool(answer["accepted"])


# --- silence ---------------------------------------------------------------------------------------------


async def test_the_silent_are_flagged_and_told_for_how_long(ledger: SqlLedger, clock: ManualClock) -> None:
    """At the deadline, not before; once."""
    await running(ledger)
    clock.time += 9.9
    silence = await ledger.fall_silent(["1", "unknown"], clock.time)
    assert silence.lateness_s == []
    assert silence.later == {"1": pytest.approx(clock.time + 0.1)}
    assert await ledger.overdue(clock.time, 9) == []
    clock.time += 0.6
    assert await ledger.overdue(clock.time, 9) == ["1"]
    silence = await ledger.fall_silent(["1"], clock.time)
    assert silence.lateness_s == [pytest.approx(0.5)]
    assert await flag(ledger, clock) == 0
    last = (await told(ledger))[-1]
    assert (last["status"], last["message"]) == ("TIMED_OUT", "no update for 10.5 s; 10 s are allowed")
    assert await ledger.overdue(clock.time, 9) == []


async def test_their_deadlines_are_told_to_watchers_only(ledger: SqlLedger, clock: ManualClock) -> None:
    """By a header with the ledger's name; a job that may be silent has none."""
    await running(ledger)
    await running(ledger, "2", update_timeout_s=None)
    headers = {json.loads(each.body)["executionId"]: each.headers for each in await status(ledger)}
    assert headers == {"1": {WATCHED: ledger.identity}, "2": None}
    deadlines = [each.get("updateDeadline") for each in await told(ledger)]
    assert deadlines == [None, timestamp(clock.time + 10)]
    assert [each.get("updateDeadline") for each in await told(ledger, "2")] == [None, None]


async def test_an_update_that_was_persisted_first_wins(ledger: SqlLedger, clock: ManualClock) -> None:
    """In the same moment, even in the same transaction."""
    await outside(ledger)
    clock.time += 11
    updating = ledger.updating(updated(progress=50))
    silence = await ledger.fall_silent(["1"], clock.time)
    assert (await updating)[0][0]["accepted"] is True
    assert silence.later == {"1": pytest.approx(clock.time + 10)}
    assert "TIMED_OUT" not in await statuses(ledger)


async def test_a_time_out_that_was_persisted_first_is_told(ledger: SqlLedger, clock: ManualClock) -> None:
    """And the update comes late."""
    await outside(ledger)
    clock.time += 11
    flagging = asyncio.create_task(ledger.fall_silent(["1"], clock.time))
    await asyncio.sleep(0)
    assert await update(ledger, progress=50)
    assert len((await flagging).lateness_s) == 1
    assert (await statuses(ledger))[-2:] == ["TIMED_OUT", "RUNNING"]
    assert [each.get("late") for each in await told(ledger)][-2:] == [None, True]


@pytest.mark.parametrize("first", ["silence", "completion"])
async def test_a_completion_against_a_time_out_has_one_end(
    ledger: SqlLedger, clock: ManualClock, first: str
) -> None:
    """Either it never timed out, or it completed late."""
    await running(ledger)
    clock.time += 11
    if first == "silence":
        assert await flag(ledger, clock) == 1
    await ledger.apply("1", 1, [Completed(result="ok")])
    assert await flag(ledger, clock) == 0
    end = ["TIMED_OUT", "COMPLETED"] if first == "silence" else ["COMPLETED"]
    assert (await statuses(ledger))[2:] == end
    assert (await told(ledger))[-1].get("late") == (True if first == "silence" else None)


async def test_a_clock_that_was_set_meanwhile_flags_nobody(ledger: SqlLedger, clock: ManualClock) -> None:
    """What counts is the watcher's time when it asked."""
    await running(ledger)
    asked = clock.time
    clock.time += 3600
    assert (await ledger.fall_silent(["1"], asked)).lateness_s == []
    assert await ledger.overdue(asked, 9) == []


async def test_all_deadlines_are_read_in_pages(ledger: SqlLedger, clock: ManualClock) -> None:
    """Equal ones too; those that do not run are none."""
    for number in (6, 5, 4, 3, 2, 1, 0):
        await running(ledger, f"{number}", update_timeout_s=10.0 + number // 3)
    await queued(ledger, "waits", update_timeout_s=5.0)
    await ledger.apply("6", 1, [Completed()])
    found: list[tuple[str, float]] = []
    while page := await ledger.watched((found[-1][1], found[-1][0]) if found else (0.0, ""), 2):
        assert len(page) <= 2
        found += page
    assert [name for name, _ in found] == ["0", "1", "2", "3", "4", "5"]
    assert [at - clock.time for _, at in found] == pytest.approx([10, 10, 10, 11, 11, 11])


async def test_the_overdue_are_found_in_pages(ledger: SqlLedger, clock: ManualClock) -> None:
    """Who is silent longest comes first; at the very deadline it is due."""
    await running(ledger, "late", update_timeout_s=10.0)
    await running(ledger, "early", update_timeout_s=9.0)
    clock.time += 10
    assert await ledger.overdue(clock.time, 1) == ["early"]
    assert await ledger.overdue(clock.time, 9) == ["early", "late"]
    assert (await ledger.fall_silent(["late"], clock.time)).lateness_s == [0.0]


# --- the time of grace -----------------------------------------------------------------------------------


async def test_the_grace_ends_in_its_time_also_after_a_restart(url: str, clock: ManualClock) -> None:
    """Silently; then the attempt is fenced, and what comes is refused and applied nowhere."""
    async with SqlLedger(url, Names("t"), clock) as ledger:
        await outside(ledger, timeout_grace_s=60)
        clock.time += 11
        await flag(ledger, clock)
    clock.time += 59
    async with SqlLedger(url, Names("t"), clock) as ledger:
        await run_out(ledger, clock)
        assert Reader(url).find("1").fenced is False
        clock.time += 1
        before = await told(ledger)
        await run_out(ledger, clock)
        assert Reader(url).find("1").fenced is True
        assert not await update(ledger, "COMPLETED", jobContextVariables={"x": 1})
        assert await told(ledger) == before
        history = Reader(url).history("1")
        assert [entry.event for entry in history[-2:]] == ["GraceEnded", "Completed refused"]
        assert (history[-2].actor, history[-2].reason) == (
            "watcher",
            "no update within 60 s after the time-out",
        )


async def test_what_is_open_to_late_updates_is_not_purged(
    ledger: SqlLedger, clock: ManualClock, url: str
) -> None:
    """However short records are kept: its work may go on, and its locks are held for it."""
    await outside(ledger, timeout_grace_s=60)
    clock.time += 11
    await flag(ledger, clock)
    clock.time += 60
    assert (count_finished(url, clock.time).executions, await ledger.purge(clock.time, 9)) == (0, 0)
    await run_out(ledger, clock)
    assert (count_finished(url, clock.time).executions, await ledger.purge(clock.time, 9)) == (1, 1)


async def test_a_late_update_ends_the_grace(ledger: SqlLedger, clock: ManualClock, url: str) -> None:
    """It runs again, and its old grace closes nothing."""
    await outside(ledger, timeout_grace_s=60)
    clock.time += 11
    await flag(ledger, clock)
    clock.time += 59
    assert await update(ledger)
    clock.time += 5
    await run_out(ledger, clock)
    assert (Reader(url).find("1").fenced, (await statuses(ledger))[-1]) == (False, "RUNNING")


async def test_the_policy_retries_when_the_grace_is_over(ledger: SqlLedger, clock: ManualClock) -> None:
    """A new attempt with a new token; the old one's work here is stopped."""
    ledger.govern({"a": Policy(RetryPolicy(2, on_timeout=True))})
    await running(ledger, max_attempts=2, timeout_grace_s=60)
    clock.time += 11
    await flag(ledger, clock)
    clock.time += 60
    found = await run_out(ledger, clock)
    assert [(stop.execution.attempt, stop.actor) for stop in found.stops] == [(1, "watcher")]
    last = (await told(ledger))[-1]
    assert (last["status"], last["attempt"]) == ("QUEUED", 2)
    assert not await update(ledger)


async def test_work_outside_is_not_stopped_when_the_grace_is_over(
    ledger: SqlLedger, clock: ManualClock
) -> None:
    await outside(ledger, timeout_grace_s=0)
    clock.time += 11
    await flag(ledger, clock)
    found = await run_out(ledger, clock)
    assert (found.stops, found.left) == ([], [])
    assert await ledger.due_calls(9) == []


# --- waits and limits ------------------------------------------------------------------------------------


async def error_of(ledger: SqlLedger, name: str = "1") -> dict[str, Any]:
    last = (await told(ledger, name))[-1]
    assert last["status"] == "FAILED", last
    error: dict[str, Any] = last["error"]
    return error


async def test_a_wait_for_a_slot_has_an_end(ledger: SqlLedger, clock: ManualClock) -> None:
    """FAILED, not retried, and it counts no more in the backlog; a time that was asked for is no wait."""
    ledger.govern({"a": Policy(RetryPolicy(5))})
    await queued(ledger, "1", queue_timeout_s=10.0, max_attempts=5)
    await queued(ledger, "later", queue_timeout_s=10.0, not_before=clock.time + 60)
    await queued(ledger, "patient")
    clock.time += 9
    assert (await run_out(ledger, clock)).left == []
    clock.time += 1
    found = await run_out(ledger, clock)
    assert (found.left, found.queued, found.stops, found.calls, found.again) == (["a"], [], [], False, False)
    assert await error_of(ledger) == {
        "type": "QueueTimeout",
        "message": "waited for a slot longer than 10 s",
    }
    assert await ledger.queued() == {"a": 1}
    assert await statuses(ledger, "later") == ["QUEUED"]
    clock.time += 59
    assert (await run_out(ledger, clock)).left == []
    clock.time += 1
    assert (await run_out(ledger, clock)).left == []  # it was not in the backlog
    assert (await error_of(ledger, "later"))["type"] == "QueueTimeout"
    assert await statuses(ledger, "patient") == ["QUEUED"]


async def test_who_starts_waits_no_more(ledger: SqlLedger, clock: ManualClock) -> None:
    await running(ledger, queue_timeout_s=10.0, update_timeout_s=None)
    clock.time += 100
    await run_out(ledger, clock)
    assert (await statuses(ledger))[-1] == "RUNNING"


async def test_who_was_handed_back_waits_elsewhere(ledger: SqlLedger, clock: ManualClock) -> None:
    await queued(ledger, "1", queue_timeout_s=10.0)
    await ledger.hand_back()
    clock.time += 100
    assert (await run_out(ledger, clock)).left == []
    assert await statuses(ledger) == ["QUEUED"]


def answer(name: str, **reply: Any) -> list[Heard]:
    """An answer of the lock service."""
    body = json.dumps({"owner": name, **reply})
    return [Heard(LockReply.model_validate_json(body), f"{name}#000000001")]


def granted(clock: ManualClock, name: str = "1") -> list[Heard]:
    until = timestamp(clock.time + 60)
    grant = {"resource": "asset/42", "mode": "EXCLUSIVE", "fencingToken": 7, "leaseUntil": until}
    return answer(name, status="GRANTED", grants=[grant])


def waiting(name: str = "1") -> list[Heard]:
    place = {"resource": "asset/42", "mode": "EXCLUSIVE", "position": 1, "holders": ["x"]}
    return answer(name, status="WAITING", **place)


@pytest.mark.parametrize("answered", [True, False])
async def test_a_wait_for_locks_has_an_end(ledger: SqlLedger, clock: ManualClock, answered: bool) -> None:
    """Of its own; also where the lock service does not answer. Its place in the queue is given up."""
    await queued(ledger, "1", wants_locks=True, lock_timeout_s=10.0, queue_timeout_s=1.0)
    if answered:
        await ledger.hearing(waiting())
    clock.time += 9.9
    await run_out(ledger, clock)
    assert "FAILED" not in await statuses(ledger)
    clock.time += 0.2
    found = await run_out(ledger, clock)
    assert found.left == []
    assert await error_of(ledger) == {
        "type": "LockTimeout",
        "message": "waited for its locks longer than 10 s",
    }
    last = [message for message in await ledger.outbox(0, 99) if message.routing_key == "t.locks"][-1]
    assert json.loads(last.body)["operation"] == "release"


async def test_who_has_its_locks_waits_for_a_slot(ledger: SqlLedger, clock: ManualClock) -> None:
    """The other clock runs from then on; given back, the first one runs anew."""
    await queued(ledger, "1", wants_locks=True, lock_timeout_s=40.0, queue_timeout_s=5.0)
    await queued(ledger, "2", wants_locks=True, lock_timeout_s=40.0)
    clock.time += 8
    await ledger.hearing(granted(clock))
    await ledger.hearing(granted(clock, "2"))
    clock.time += 4.9
    await run_out(ledger, clock)
    assert "FAILED" not in await statuses(ledger)
    clock.time += 0.2
    await run_out(ledger, clock)
    assert (await error_of(ledger))["type"] == "QueueTimeout"
    clock.time += 30
    assert await ledger.go_on_locking(0.0) == 1  # the other's are given back, unused
    clock.time += 39
    await run_out(ledger, clock)
    assert (await statuses(ledger, "2"))[-1] == "WAITING_FOR_LOCK"
    clock.time += 1.1
    await run_out(ledger, clock)
    assert (await error_of(ledger, "2"))["type"] == "LockTimeout"


async def test_work_outside_has_a_limit(ledger: SqlLedger, clock: ManualClock) -> None:
    """Updates do not move it; the executor is asked to stop that work, though a next attempt is due."""
    ledger.govern({"a": Policy(RetryPolicy(2), hooks=frozenset({"cancel"}))})
    await outside(ledger, execution_timeout_s=30.0, max_attempts=2)
    for _ in range(3):
        clock.time += 9
        assert await update(ledger)
        await run_out(ledger, clock)
    clock.time += 3.1
    found = await run_out(ledger, clock)
    assert (found.calls, found.stops, found.left, found.queued) == (True, [], [], [])
    failed = (await told(ledger))[-2]
    assert failed["error"] == {"type": "ExecutionTimeout", "message": "ran longer than its limit of 30 s"}
    assert (await told(ledger))[-1]["attempt"] == 2
    [call] = await ledger.due_calls(9)
    assert (call.name, call.execution.attempt, call.execution.external_id) == ("cancel", 1, "x-1")
    await ledger.answering(call, None)
    assert await ledger.due_calls(9) == []


async def test_work_here_has_its_limit_from_the_worker(ledger: SqlLedger, clock: ManualClock) -> None:
    await running(ledger, execution_timeout_s=5.0, update_timeout_s=None)
    clock.time += 100
    await run_out(ledger, clock)
    assert (await statuses(ledger))[-1] == "RUNNING"


async def test_what_ran_out_is_ended_in_bounded_steps(ledger: SqlLedger, clock: ManualClock) -> None:
    """Who has waited too long for longest comes first."""
    for number in (4, 3, 2, 1, 0):
        await queued(ledger, str(number), queue_timeout_s=10.0 + number)
    clock.time += 14
    left = []
    for _ in range(3):
        found = await ledger.run_out(clock.time, 2)
        left.append((len(found.left), found.again))
    assert left == [(2, True), (2, True), (1, False)]
    failed = [each["executionId"] for each in map(_body, await status(ledger)) if each["status"] == "FAILED"]
    assert failed == ["0", "1", "2", "3", "4"]


async def test_locks_that_work_outside_lost_fail_it(ledger: SqlLedger, clock: ManualClock) -> None:
    """In the transaction in which that is heard; TIMED_OUT too, and that is no late update."""
    for name in ("1", "2"):
        await queued(ledger, name, wants_locks=True, update_timeout_s=10.0)
        await ledger.hearing(granted(clock, name))
        await ledger.claim(Capacity(1, {"a": 1}))
        await ledger.apply(name, 1, [Launched(external_id=f"x-{name}")])
    clock.time += 11
    assert await flag(ledger, clock, "2") == 1
    for name in ("1", "2"):
        revoked = answer(name, status="REVOKED", lost=["asset/42"], reason="stuck")
        assert await ledger.hearing(revoked) == []
        assert await error_of(ledger, name) == {"type": "LockLost", "message": "asset/42: stuck"}
        assert "late" not in (await told(ledger, name))[-1]
    assert [call.name for call in await ledger.due_calls(9)] == ["cancel", "cancel"]
    assert await ledger.lock_states("held") == []


async def test_many_that_end_in_one_transaction(ledger: SqlLedger) -> None:
    """What was due to be called for each of them is not any more."""
    ledger.govern({"a": Policy(hooks=frozenset({"poll"}))})
    for name in ("1", "2", "3"):
        await outside(ledger, name)
    both = ledger.updating([*updated("COMPLETED", name="1"), *updated("COMPLETED", name="2")])
    assert [answer["accepted"] for answer in (await both)[0]] == [True, True]
    for name in ("1", "2"):
        assert (await statuses(ledger, name))[-1] == "COMPLETED"


async def test_what_the_watcher_ends_it_ends_in_its_name(
    ledger: SqlLedger, clock: ManualClock, url: str
) -> None:
    """In the history: neither an executor nor an operator has done it."""
    await queued(ledger, "slot", queue_timeout_s=10.0)
    await queued(ledger, "locks", wants_locks=True, lock_timeout_s=10.0)
    await outside(ledger, "limit", execution_timeout_s=10.0, priority=1)
    clock.time += 10
    await run_out(ledger, clock)
    for name, event in (("slot", "QueueTimeout"), ("locks", "LockTimeout"), ("limit", "ExecutionTimeout")):
        last = Reader(url).history(name)[-1]
        assert (last.actor, last.status) == ("watcher", "FAILED"), event


# --- the wall clock --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3600.0, -3600.0])
async def test_what_is_to_come_moves_with_the_clock(
    ledger: SqlLedger, clock: ManualClock, step: float
) -> None:
    """Except what was written by the new time already."""
    await running(ledger, update_timeout_s=10.0)
    await queued(ledger, "waits", queue_timeout_s=10.0)
    clock.time += 5 + step
    await running(ledger, "new", update_timeout_s=10.0, priority=9)
    clock.time += 0.5
    assert await ledger.shift_clocks(step) == 2
    assert {name: at - clock.time for name, at in await ledger.watched((0.0, ""), 9)} == {
        "1": pytest.approx(4.5),
        "new": pytest.approx(9.5),
    }
    clock.time += 4.4
    assert (await run_out(ledger, clock)).left == []
    clock.time += 0.2
    assert (await run_out(ledger, clock)).left == ["a"]


async def test_polls_go_on_when_the_clock_is_set_back(ledger: SqlLedger, clock: ManualClock) -> None:
    """They are the signs of life of work outside: an hour without them would time it out."""
    ledger.govern({"a": Policy(hooks=frozenset({"poll"}))})
    await outside(ledger, "old")
    clock.time += -3600 + 0.5
    await outside(ledger, "new")
    await ledger.shift_clocks(-3600)
    for name in ("old", "new"):
        clock.time += 0.5
        assert [call.execution.execution_id for call in await ledger.due_calls(9)] == [name]


@pytest.mark.parametrize("step", [3600.0, -3600.0])
async def test_an_instant_that_was_asked_for_stays(
    ledger: SqlLedger, clock: ManualClock, url: str, step: float
) -> None:
    """However the clock is set, and the wait for a slot begins with it."""
    await queued(ledger, "1", queue_timeout_s=10.0, not_before=(at := clock.time + 9000))
    clock.time += 5 + step
    assert await ledger.shift_clocks(step) == 0
    found = Reader(url).find("1")
    assert (found.not_before, found.due_at) == (at, at + 10)
    clock.time = at + 9.9
    await run_out(ledger, clock)
    assert await statuses(ledger) == ["QUEUED"]
    assert await ledger.shift_clocks(step) == 1  # it waits for a slot now
    assert Reader(url).find("1").due_at == at + 10 + step


@pytest.mark.parametrize("wants_locks", [True, False])
async def test_the_delay_of_another_attempt_moves_with_the_clock(
    ledger: SqlLedger, clock: ManualClock, url: str, wants_locks: bool
) -> None:
    """Set back, it would come late, behind the end of the wait for a slot, or for locks, which begins with it."""
    ledger.govern({"a": Policy(RetryPolicy(2, first_s=60.0, jitter=0))})
    limits = {"queue_timeout_s": 20.0, "lock_timeout_s": 20.0, "update_timeout_s": None}
    await queued(ledger, "1", wants_locks=wants_locks, max_attempts=2, **limits)
    if wants_locks:
        await ledger.hearing(granted(clock))
    await ledger.claim(Capacity(1, {"a": 1}))
    await ledger.apply("1", 1, [Failed(error_type="X", error_message="")])
    clock.time += 5 - 3600
    await ledger.shift_clocks(-3600)
    found = Reader(url).find("1")
    assert (found.not_before, found.due_at) == (clock.time + 55, clock.time + 75)
    clock.time += 55
    if wants_locks:
        await ledger.go_on_locking(0.0)
        assert await ledger.lock_states("asked") == ["1"]
    else:
        assert await ledger.claim(Capacity(1, {"a": 1}))


async def test_a_wait_that_begins_by_the_new_time_is_not_moved(
    ledger: SqlLedger, clock: ManualClock, url: str
) -> None:
    """That of who has its locks now, and of who came back from elsewhere."""
    await queued(ledger, "1", wants_locks=True, lock_timeout_s=40.0, queue_timeout_s=5.0)
    await queued(ledger, "2", queue_timeout_s=5.0)
    await ledger.hand_back({"a"})
    clock.time += 60
    await queued(ledger, "3", wants_locks=True, lock_timeout_s=40.0, queue_timeout_s=5.0)
    clock.time -= 3600
    await queued(ledger, "2", queue_timeout_s=5.0, sequence=1)
    await ledger.hearing(granted(clock, "3"))
    await ledger.shift_clocks(-3600)
    assert [Reader(url).find(name).due_at for name in ("2", "3")] == [clock.time + 5] * 2


async def test_what_was_asked_of_the_lock_service_is_asked_again_in_time(
    ledger: SqlLedger, clock: ManualClock
) -> None:
    """Though the clock was set back, and the request lies an hour ahead by the new time."""
    await queued(ledger, "1", wants_locks=True)
    clock.time += 5 - 3600
    await queued(ledger, "2", wants_locks=True)
    await ledger.shift_clocks(-3600)
    asked = [message.id for message in await ledger.outbox(0, 99)]
    await ledger.go_on_locking(clock.time - 1)
    again = await ledger.outbox(asked[-1], 99)
    assert [json.loads(message.body)["owner"] for message in again] == ["1"]


# --- upgrading -------------------------------------------------------------------------------------------


async def test_clocks_of_an_older_ledger_run_after_the_upgrade(url: str, clock: ManualClock) -> None:
    """As if they had always been kept."""
    async with SqlLedger(url, Names("t"), clock) as ledger:
        await outside(ledger, "out", execution_timeout_s=30.0)
        await outside(ledger, "silent", timeout_grace_s=60.0)
        clock.time += 11
        await flag(ledger, clock, "silent")
        await queued(ledger, "slot", queue_timeout_s=10.0)
        await queued(ledger, "lock", wants_locks=True, lock_timeout_s=20.0)
        await ledger.apply("out", 1, [Progressed()])
        expected = {each: Reader(url).find(each).due_at for each in ("out", "silent", "slot", "lock")}
    assert all(expected.values())
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX executions_by_due_time"))
        for table in ("workflows", "workflow_definitions", "workflow_history"):
            connection.execute(text(f"DROP TABLE {table}"))
        added = [("executions", "due_at"), ("executions", "stage"), ("calls", "attempt")]
        added += [("calls", "external_id"), ("outbox", "at")]
        for table, column in added:
            connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0003'"))
    engine.dispose()
    async with SqlLedger(url, Names("t"), clock):
        assert {each: Reader(url).find(each).due_at for each in expected} == expected


async def test_the_clocks_are_found_by_their_index(ledger: SqlLedger, url: str) -> None:
    """A look at a ledger of a million jobs costs what is due, not what is there."""
    engine = create_engine(url)
    queries = {
        "executions_by_due_time": "due_at IS NOT NULL AND handed_back IS 0 AND due_at <= 5 ORDER BY due_at",
        "executions_by_deadline": "update_deadline IS NOT NULL AND update_deadline <= 5 ORDER BY update_deadline",
    }
    with engine.connect() as connection:
        for index, query in queries.items():
            plan = connection.execute(
                text(f"EXPLAIN QUERY PLAN SELECT * FROM executions WHERE {query}")
            ).all()
            assert index in str(plan)
    engine.dispose()
