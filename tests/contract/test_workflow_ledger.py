"""Workflows in a real ledger: state, requests and what is told in one step; reconciled, purged, one after the other."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jef_daemon.errors import NotFound
from jef_daemon.ledger import SqlLedger
from jef_daemon.ledger.workflow_reading import WorkflowReader
from jef_daemon.lifecycle import Completed, Execution, Failed, Status
from jef_daemon.messages import Control
from jef_daemon.names import Names
from jef_daemon.ports import Arrival, Capacity
from jef_daemon.workflow import events
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.inputs import Became, Begin, JobEnded, WorkflowCommand
from tests.support.clock import ManualClock

ROW = {
    "name": "row",
    "concurrency": 1,
    "stages": [{"name": "a", "action": "x"}, {"name": "b", "action": "x"}],
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def ledger(url: str, clock: ManualClock) -> AsyncIterator[SqlLedger]:
    async with SqlLedger(url, Names("t"), clock) as opened:
        yield opened


def begin(workflow_id: str, definition: Mapping[str, Any] = ROW, **more: Any) -> Begin:
    body = Definition.model_validate(definition).canonical()
    return Begin(workflow_id, definition["name"], {definition["name"]: body}, **more)


def ended(key: str, stage: str, attempt: int = 1, status: Status = Status.COMPLETED) -> JobEnded:
    return JobEnded(key, events.Ended(stage=stage, index=None, attempt=attempt, status=status))


async def posted(ledger: SqlLedger, exchange: str) -> list[dict[str, Any]]:
    return [json.loads(each.body) for each in await ledger.outbox(0, 10_000) if each.exchange == exchange]


async def asked(ledger: SqlLedger) -> list[str]:
    return [request["executionId"] for request in await posted(ledger, "t.jobs")]


async def test_a_change_its_requests_and_what_is_told_are_one_step(ledger: SqlLedger, url: str) -> None:
    assert await ledger.coordinating([begin("w"), begin("w")]) == [Became.NEW, Became.KNOWN]
    assert await asked(ledger) == ["w:a:1"]
    assert await ledger.coordinating([ended("w", "a"), ended("w", "a")]) == [Became.TAKEN, Became.IGNORED]
    assert await asked(ledger) == ["w:a:1", "w:b:1"]
    assert await ledger.coordinating([ended("nobody", "a")]) == [Became.IGNORED]
    await ledger.coordinating([ended("w", "b")])
    told = await posted(ledger, "t.workflow-status")
    assert [each["status"] for each in told] == ["QUEUED", "RUNNING", "RUNNING", "COMPLETED"]
    assert [each["sequence"] for each in told] == [1, 2, 3, 4]
    assert WorkflowReader(url).find("w").state.status is Status.COMPLETED


async def test_so_many_run_as_may_by_priority_then_by_age(ledger: SqlLedger) -> None:
    await ledger.coordinating([begin("w-1")])
    await ledger.coordinating([begin("w-2"), begin("w-3", priority=5)])
    assert await asked(ledger) == ["w-1:a:1"]
    await ledger.coordinating([ended("w-1", "a"), ended("w-1", "b")])
    assert (await asked(ledger))[2:] == ["w-3:a:1"]
    await ledger.coordinating([ended("w-3", "a", status=Status.FAILED)])
    assert (await asked(ledger))[3:] == ["w-2:a:1"]
    retry = WorkflowCommand(Control.model_validate({"command": "retry", "workflowId": "w-3"}), "asker", "1")
    assert await ledger.coordinating([retry]) == [Became.TAKEN]
    assert (await posted(ledger, ""))[-1] == {"accepted": True, "status": "QUEUED", "reason": None}
    await ledger.coordinating([ended("w-2", "a"), ended("w-2", "b")])
    assert (await asked(ledger))[-1] == "w-3:a:2"


async def test_a_workflow_stays_with_its_revision(ledger: SqlLedger) -> None:
    """Its definition is another by now; it goes on with the one that it began with."""
    await ledger.coordinating([begin("w-1")])
    other = {**ROW, "stages": [{"name": "a", "action": "x"}, {"name": "c", "action": "y"}]}
    await ledger.coordinating([begin("w-2", other)])
    await ledger.coordinating([ended("w-1", "a"), ended("w-1", "b")])
    await ledger.coordinating([ended("w-2", "a")])
    assert await asked(ledger) == ["w-1:a:1", "w-1:b:1", "w-2:a:1", "w-2:c:1"]
    assert await ledger.workflow_actions() == {"x", "y"}


async def test_an_end_whose_notification_was_lost_is_found_in_the_ledger(ledger: SqlLedger) -> None:
    """Taken once, with its variables."""
    await ledger.coordinating([begin("w")])
    await run_here(ledger, "w:a:1", Completed(result="done", workflow_context_variables={"v": 1}))
    await ledger.reconcile_workflows()
    assert await asked(ledger) == ["w:a:1", "w:b:1"]
    await ledger.reconcile_workflows()
    assert await asked(ledger) == ["w:a:1", "w:b:1"]
    request = (await posted(ledger, "t.jobs"))[-1]
    assert request["workflowContextVariables"] == {"v": 1}


async def run_here(ledger: SqlLedger, name: str, event: Completed | Failed) -> None:
    body = json.dumps({"executionId": name})
    await ledger.accept([Arrival(Execution(name, "x", workflow_id="w", stage="a", token="t"), body)])
    await ledger.claim(Capacity(1, {"x": 1}))
    await ledger.apply(name, 1, [event])


async def test_finished_workflows_are_purged_with_their_definitions(
    ledger: SqlLedger, url: str, clock: ManualClock
) -> None:
    await ledger.coordinating([begin("old")])
    await ledger.coordinating([ended("old", "a"), ended("old", "b")])
    clock.time += 100
    await ledger.coordinating([begin("open", {**ROW, "name": "other"})])
    await ledger.purge(clock.time - 50, 10)
    reader = WorkflowReader(url)
    with pytest.raises(NotFound):
        reader.find("old")
    assert list(reader.history("old")) == []
    assert reader.find("open").state.status is Status.RUNNING
    clock.time += 1000
    await ledger.purge(clock.time, 10)
    await ledger.coordinating([ended("open", "a")])
    assert (await asked(ledger))[-1] == "open:b:1"
