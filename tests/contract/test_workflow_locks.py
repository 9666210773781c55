"""Locks that workflows hold, in a real ledger: asked with the change that needs them, kept, lost, released, purged."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from jef_daemon.ledger import SqlLedger
from jef_daemon.ledger.opening import open_engine
from jef_daemon.ledger.workflow_reading import WorkflowReader
from jef_daemon.lifecycle import Status
from jef_daemon.lock.messages import LockReply
from jef_daemon.lock.requests import Acquire, ForceRelease
from jef_daemon.lock.state import Mode
from jef_daemon.messages import Control
from jef_daemon.ports import Heard, LockTimes
from jef_daemon.workflow import events
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.inputs import Begin, JobEnded, WorkflowCommand
from jef_daemon.workflow.state import State, key_of, parsed
from tests.support.clock import ManualClock
from tests.support.lock_wire import NAMES, Wire
from tests.support.stored_locks import fresh

TIMES = LockTimes(workflow_s=900.0)
ALONE: dict[str, Any] = {
    "name": "alone",
    "locks": [{"resource": "asset/1"}],
    "stages": [{"name": "a", "action": "x"}],
}


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
def wire(ledger: SqlLedger) -> Wire:
    return Wire(ledger)


@pytest.fixture
def state(url: str) -> Any:
    """Looks at a workflow."""

    def find(workflow_id: str) -> State:
        return WorkflowReader(url).find(workflow_id).state

    return find


def begin(workflow_id: str, definition: dict[str, Any] = ALONE) -> Begin:
    body = Definition.model_validate(definition).canonical()
    return Begin(workflow_id, definition["name"], {definition["name"]: body})


def ended(name: str, status: Status = Status.COMPLETED) -> JobEnded:
    key, stage, index, attempt = parsed(name) or ("", "", None, 0)
    return JobEnded(key, events.Ended(stage=stage, index=index, attempt=attempt, status=status))


async def jobs(ledger: SqlLedger) -> list[str]:
    outbox = await ledger.outbox(0, 10_000)
    return [json.loads(each.body)["executionId"] for each in outbox if each.exchange == NAMES.jobs]


async def test_a_request_for_locks_leaves_with_the_change_that_needs_them(
    ledger: SqlLedger, wire: Wire, state: Any
) -> None:
    """For a lease of its own length; nothing else leaves before the answer."""
    await ledger.coordinating([begin("w")])
    await wire.carry()
    [request] = wire.requests
    assert json.loads(request.body) == {
        "operation": "acquire",
        "owner": "workflow/w",
        "locks": [{"resource": "asset/1", "mode": "EXCLUSIVE"}],
        "leaseSeconds": 900.0,
        "waitLeaseSeconds": 1800.0,
        "sole": True,
    }
    assert request.reply_to == f"t.lock-replies.{ledger.identity}"
    assert await jobs(ledger) == []
    await wire.settle()
    assert await jobs(ledger) == ["w:a:1"]
    assert (state("w").status.value, state("w").locks[0].token) == ("RUNNING", 1)
    assert await ledger.lock_states("held") == ["workflow/w"]


async def test_the_end_and_the_release_are_one_step_and_the_next_begins(
    ledger: SqlLedger, wire: Wire, state: Any
) -> None:
    await ledger.coordinating([begin("w-1"), begin("w-2")])
    await wire.settle()
    assert state("w-2").waiting_for == {
        "resource": "asset/1",
        "mode": "EXCLUSIVE",
        "position": 1,
        "holders": ["workflow/w-1"],
    }
    await ledger.coordinating([ended("w-1:a:1")])
    await wire.carry()
    assert wire.log[-1] == "release workflow/w-1#000000001"
    assert await jobs(ledger) == ["w-1:a:1"]
    await wire.settle()
    assert await jobs(ledger) == ["w-1:a:1", "w-2:a:1"]
    told = [each["status"] for each in wire.told if each.get("workflowId") == "w-2"]
    assert told == ["QUEUED", "WAITING_FOR_LOCK", "WAITING_FOR_LOCK", "RUNNING"]


async def test_an_answer_that_comes_twice_or_late_changes_nothing(
    ledger: SqlLedger, wire: Wire, state: Any
) -> None:
    """Of one that is granted, cancelled, or has asked anew."""
    await ledger.coordinating([begin("w")])
    await wire.settle()
    [answer] = wire.heard
    reply = Heard(LockReply.model_validate_json(answer.body), answer.correlation_id or "")
    sequence = state("w").sequence
    await ledger.hearing([reply, reply])
    assert (state("w").sequence, await jobs(ledger)) == (sequence, ["w:a:1"])
    await ledger.coordinating([ended("w:a:1", Status.FAILED)])
    await wire.settle()
    retry = Control.model_validate({"command": "retry", "workflowId": "w"})
    await ledger.coordinating([WorkflowCommand(retry)])
    await ledger.hearing([reply])
    assert state("w").status is Status.WAITING_FOR_LOCK
    assert await jobs(ledger) == ["w:a:1"]
    await wire.settle()
    assert state("w").locks[0].token == 2
    assert await jobs(ledger) == ["w:a:1", "w:a:2"]


async def test_what_is_lost_while_it_waits_is_asked_for_again(ledger: SqlLedger, wire: Wire) -> None:
    await ledger.deciding([Acquire(owner="other", locks=(("asset/1", Mode.EXCLUSIVE),), lease_s=10_000)])
    await ledger.coordinating([begin("w")])
    await wire.settle()
    gone = LockReply(status="KEPT", lost=["workflow/w"], held=[])
    await ledger.hearing([Heard(gone, "keep")])
    await wire.carry()
    assert wire.asked()[1:] == ["release workflow/w#000000001", "acquire workflow/w#000000002"]


async def test_a_lock_of_two_that_is_taken_away_gives_the_other_back(
    ledger: SqlLedger, wire: Wire, state: Any
) -> None:
    """And stops what runs; the workflow's own clock-less cleaning up needs no lock service."""
    both = {**ALONE, "locks": [{"resource": "asset/1"}, {"resource": "asset/2"}]}
    await ledger.coordinating([begin("w", both)])
    await wire.settle()
    await ledger.deciding([ForceRelease(resource="asset/1", owner=None, reason="stuck", by="ops")])
    await wire.hear()
    assert wire.log[-1] == "release workflow/w#000000001"
    assert state("w").error["type"] == "LockLost"
    outbox = await ledger.outbox(0, 10_000)
    commands = [json.loads(each.body) for each in outbox if each.routing_key == NAMES.control]
    assert [(each["command"], each["executionId"]) for each in commands] == [("cancel", "w:a:1")]
    assert await ledger.lock_states("held") == []
    await ledger.coordinating([ended("w:a:1", Status.CANCELLED)])
    assert state("w").status is Status.FAILED


async def test_what_can_never_be_granted_fails_the_workflow(
    ledger: SqlLedger, wire: Wire, state: Any
) -> None:
    """With the service's sentence; nothing of it was begun, and nothing is held."""
    await ledger.coordinating([begin("w")])
    reply = LockReply(
        status="REFUSED", owner="workflow/w", code="limit", reason="70 resources; the limit is 64"
    )
    await ledger.hearing([Heard(reply, "workflow/w#000000001")])
    assert (state("w").status, state("w").message) == (
        *(Status.FAILED, "LockRefused: 70 resources; the limit is 64"),
    )
    assert (await jobs(ledger), await ledger.lock_states("released")) == ([], ["workflow/w"])


async def test_whatever_is_said_of_a_loss_the_jobs_are_stopped(ledger: SqlLedger, wire: Wire) -> None:
    """A command whose reason is too long would be refused, and the job would run on without its lock."""
    await ledger.coordinating([begin("w")])
    await wire.settle()
    await ledger.deciding([ForceRelease(resource="asset/1", owner=None, reason="r" * 1000, by="ops")])
    await wire.hear()
    outbox = await ledger.outbox(0, 10_000)
    [command] = [json.loads(each.body) for each in outbox if each.routing_key == NAMES.control]
    assert Control.model_validate(command).reason.startswith("a lock is lost: asset/1")


async def test_where_losses_are_told_only_it_goes_on(url: str, clock: ManualClock, state: Any) -> None:
    async with SqlLedger(url, NAMES, clock, lost_locks_fail=False) as ledger:
        await ledger.coordinating([begin("w")])
        wire = Wire(ledger)
        await wire.settle()
        await ledger.deciding([ForceRelease(resource="asset/1", owner=None, reason="stuck", by="ops")])
        await wire.settle()
        assert state("w").status is Status.RUNNING
        await ledger.coordinating([ended("w:a:1")])
        assert state("w").status is Status.COMPLETED


async def test_waiting_for_locks_counts_among_those_that_run(
    ledger: SqlLedger, wire: Wire, state: Any
) -> None:
    """Else more than may would run, once the locks come free."""
    await ledger.deciding([Acquire(owner="other", locks=(("asset/1", Mode.EXCLUSIVE),), lease_s=10_000)])
    few = {**ALONE, "concurrency": 2}
    await ledger.coordinating([begin(f"w-{number}", few) for number in range(3)])
    await wire.settle()
    waits = ["WAITING_FOR_LOCK", "WAITING_FOR_LOCK", "QUEUED"]
    assert [state(f"w-{number}").status.value for number in range(3)] == waits
    cancel = Control.model_validate({"command": "cancel", "workflowId": "w-0"})
    await ledger.coordinating([WorkflowCommand(cancel)])
    assert state("w-2").status is Status.WAITING_FOR_LOCK


@pytest.mark.parametrize("by", [3600, -3600])
async def test_a_wait_ends_in_time_also_when_the_clock_is_set(
    ledger: SqlLedger, wire: Wire, clock: ManualClock, state: Any, by: float
) -> None:
    await ledger.deciding([Acquire(owner="other", locks=(("asset/1", Mode.EXCLUSIVE),), lease_s=100_000)])
    await ledger.coordinating([begin("w", {**ALONE, "lockTimeout": 60})])
    await wire.settle()
    clock.time += 30
    await ledger.go_on_locking(0)
    clock.time += by
    await ledger.shift_clocks(by)
    await ledger.go_on_locking(0)
    assert state("w").status is Status.WAITING_FOR_LOCK
    clock.time += 29
    await ledger.go_on_locking(0)
    assert state("w").status is Status.WAITING_FOR_LOCK
    clock.time += 1
    await ledger.go_on_locking(0)
    assert state("w").message == "LockTimeout: waited for its locks longer than 60 s"
    await wire.carry()
    assert wire.log[-1].startswith("release workflow/w#")


async def test_a_workflow_that_cannot_be_read_keeps_no_others_wait_from_its_end(
    ledger: SqlLedger, wire: Wire, url: str, clock: ManualClock, state: Any
) -> None:
    """Whatever is due is looked at each second: a fault there would end the daemon, and the next one."""
    await ledger.coordinating([begin(name, {**ALONE, "lockTimeout": 60}) for name in ("w-1", "w-2", "w-3")])
    await wire.settle()
    with open_engine(url).begin() as connection:
        connection.execute(text("UPDATE workflows SET state = '{' WHERE workflow_id = 'w-2'"))
    clock.time += 61
    await ledger.go_on_locking(0)
    assert state("w-3").message == "LockTimeout: waited for its locks longer than 60 s"


async def test_nothing_of_its_locks_stays_behind_a_purged_workflow(
    ledger: SqlLedger, wire: Wire, clock: ManualClock
) -> None:
    await ledger.coordinating([begin("w"), begin("other", {**ALONE, "locks": [{"resource": "b"}]})])
    await wire.settle()
    await ledger.coordinating([ended("w:a:1")])
    assert await ledger.lock_states("released") == ["workflow/w"]
    clock.time += 100
    await ledger.purge(clock.time - 50, 10)
    assert await ledger.lock_states("released") == []
    assert await ledger.lock_states("held") == ["workflow/other"]


async def begin_both(ledger: SqlLedger, wire: Wire) -> str:
    """A workflow within another, both with the same lock; the key of the inner one."""
    around = {**ALONE, "name": "outer", "stages": [{"name": "i", "workflow": "alone"}]}
    bodies = {str(each["name"]): Definition.model_validate(each).canonical() for each in (around, ALONE)}
    await ledger.coordinating([Begin("w", "outer", bodies)])
    await wire.settle()
    return key_of("w:i:1")


async def test_a_workflow_within_asks_within(ledger: SqlLedger, wire: Wire, state: Any) -> None:
    """What its outer one holds; in the queue that the outer one's stages stand in too."""
    key = await begin_both(ledger, wire)
    assert await jobs(ledger) == [f"{key}:a:1"]
    assert state("w:i:1").locks[0].name == "workflow/w/asset/1"
    await ledger.coordinating([ended(f"{key}:a:1")])
    await wire.settle()
    assert state("w").status is Status.COMPLETED
    assert await ledger.lock_states("held") == []


async def test_a_workflow_within_that_is_retried_by_itself_asks_as_anybody_does(
    ledger: SqlLedger, wire: Wire, clock: ManualClock, state: Any
) -> None:
    """The one around it is over: who holds the resource by now is waited for, and its own grant is told to its jobs."""
    key = await begin_both(ledger, wire)
    await ledger.coordinating([ended(f"{key}:a:1", Status.FAILED)])
    await wire.settle()
    assert state("w").status is Status.FAILED
    await ledger.coordinating([begin("other")])
    await wire.settle()
    retry = Control.model_validate({"command": "retry", "workflowId": "w:i:1"})
    await ledger.coordinating([WorkflowCommand(retry)])
    await ledger.go_on_locking(clock.time)  # no answer came: asked again
    await wire.settle()
    asked = [json.loads(each.body)["locks"] for each in wire.requests[-2:]]
    assert asked == [[{"resource": "asset/1", "mode": "EXCLUSIVE"}]] * 2
    assert state("w:i:1").waiting_for["holders"] == ["workflow/other"]
    await ledger.coordinating([ended("other:a:1")])
    await wire.settle()
    [lock] = state("w:i:1").locks
    assert (lock.name, lock.token) == ("asset/1", 3)
    assert (await jobs(ledger))[-1] == f"{key}:a:2"


async def test_a_workflow_within_hears_that_the_one_around_it_lost_a_lock(
    url: str, clock: ManualClock, state: Any
) -> None:
    """Both go on where losses are only told; what is asked for from then on keeps everybody out."""
    spelled = {"name": "inner", "stages": [{"name": "a", "action": "x"}, {"name": "b", "action": "x"}]}
    spelled["stages"][1]["locks"] = [{"resource": "asset/1"}]  # type: ignore[index]
    inner = Definition.model_validate(spelled).canonical()
    around = {**ALONE, "name": "outer", "stages": [{"name": "i", "workflow": "inner"}]}
    outer = Definition.model_validate(around).canonical()
    async with SqlLedger(url, NAMES, clock, lost_locks_fail=False) as ledger:
        await ledger.coordinating([Begin("w", "outer", {"outer": outer, "inner": inner})])
        wire = Wire(ledger)
        await wire.settle()
        assert [held.resource for held in state("w:i:1").around] == ["asset/1"]
        await ledger.deciding([ForceRelease(resource="asset/1", owner=None, reason="stuck", by="ops")])
        await wire.settle()
        assert state("w:i:1").around == []
        await ledger.coordinating([ended(f"{key_of('w:i:1')}:a:1")])
        outbox = await ledger.outbox(0, 10_000)
        [asked] = [json.loads(each.body) for each in outbox if each.exchange == NAMES.jobs][1:]
        assert asked["locks"] == [{"resource": "asset/1", "mode": "EXCLUSIVE"}]
        assert "workflowLocks" not in asked


async def test_what_cleans_up_within_a_workflow_that_lost_a_lock_asks_as_anybody_does(
    ledger: SqlLedger, wire: Wire
) -> None:
    """Who has the resource by then would find it at work."""
    clean = {"name": "z", "action": "x", "always": True, "locks": [{"resource": "asset/1"}]}
    spelled = {"name": "inner", "stages": [{"name": "a", "action": "x"}, clean]}
    inner = Definition.model_validate(spelled).canonical()
    around = {**ALONE, "name": "outer", "stages": [{"name": "i", "workflow": "inner"}]}
    outer = Definition.model_validate(around).canonical()
    await ledger.coordinating([Begin("w", "outer", {"outer": outer, "inner": inner})])
    await wire.settle()
    await ledger.deciding([ForceRelease(resource="asset/1", owner=None, reason="stuck", by="ops")])
    await wire.settle()
    await ledger.coordinating([ended(f"{key_of('w:i:1')}:a:1", Status.CANCELLED)])
    outbox = await ledger.outbox(0, 10_000)
    asked = [json.loads(each.body) for each in outbox if each.exchange == NAMES.jobs][-1]
    assert asked["stage"] == "z"
    assert asked["locks"] == [{"resource": "asset/1", "mode": "EXCLUSIVE"}]
    assert "workflowLocks" not in asked


async def test_a_workflow_that_waits_within_one_that_lost_the_lock_waits_as_anybody_does(
    url: str, clock: ManualClock, state: Any
) -> None:
    inner = Definition.model_validate(ALONE).canonical()
    stages = [{"name": "i", "workflow": "alone", "forEach": [1, 2]}]
    outer = Definition.model_validate({**ALONE, "name": "outer", "stages": stages}).canonical()
    async with SqlLedger(url, NAMES, clock, lost_locks_fail=False) as ledger:
        await ledger.coordinating([Begin("w", "outer", {"outer": outer, "alone": inner})])
        wire = Wire(ledger)
        await wire.settle()
        assert state("w:i.1:1").waiting_for["resource"] == "workflow/w/asset/1"
        await ledger.deciding([ForceRelease(resource="asset/1", owner=None, reason="stuck", by="ops")])
        await ledger.coordinating([begin("other")])
        await wire.settle()
        assert state("w:i.1:1").waiting_for["holders"] == ["workflow/other"]
        await ledger.coordinating([ended("other:a:1")])
        await wire.settle()
        [lock] = state("w:i.1:1").locks
        assert (lock.name, lock.token) == ("asset/1", 3)
