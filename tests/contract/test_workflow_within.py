"""Workflows within one another, in a real ledger: what goes down, what comes up, how deep."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from jef_daemon.events import Completed
from jef_daemon.ledger import SqlLedger
from jef_daemon.ledger.opening import open_engine
from jef_daemon.ledger.workflow_reading import WorkflowReader
from jef_daemon.lifecycle import Execution, Status
from jef_daemon.messages import Control
from jef_daemon.names import Names
from jef_daemon.ports import Arrival, Capacity
from jef_daemon.workflow import events
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.inputs import Begin, JobEnded, WorkflowCommand
from jef_daemon.workflow.state import key_of
from tests.support.clock import ManualClock
from tests.support.kept_workflows import asked, begin, ended, nested, posted


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[SqlLedger]:
    async with SqlLedger(url, Names("t"), ManualClock()) as opened:
        yield opened


async def test_workflows_within_one_another_pass_on_what_they_are_pinned_to(
    ledger: SqlLedger, url: str
) -> None:
    """And the producer's span; the end of the innermost is the end of all."""
    span = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    await ledger.coordinating([Begin("w", "one", nested("one", "two", "three"), traceparent=span)])
    [job] = [each for each in await ledger.outbox(0, 100) if each.exchange == "t.jobs"]
    assert (job.headers or {})["traceparent"] == span
    told = [each for each in await ledger.outbox(0, 100) if each.exchange == "t.workflow-status"]
    assert {(each.headers or {})["traceparent"] for each in told} == {span}
    key = json.loads(job.body)["executionId"].partition(":")[0]
    assert await ledger.workflow_actions() == {"x"}
    await ledger.coordinating([ended(key, "s")])
    reader = WorkflowReader(url)
    page, _ = reader.page([], None, 10)
    assert [(kept.name, kept.state.status.value) for kept in page] == [
        *(("three", "COMPLETED"), ("two", "COMPLETED"), ("one", "COMPLETED"))
    ]
    assert [(entry.event, entry.actor) for entry in reader.history("w")] == [
        *(("Accepted", "producer"), ("Begun", "coordinator"), ("Started", "coordinator")),
        *(("Completed", "workflow"), ("Completed", "coordinator")),
    ]


async def test_the_context_of_a_workflow_within_is_what_its_stage_passes_on(ledger: SqlLedger) -> None:
    """The outer context stays as it is."""
    stages = [{"name": "s", "workflow": "two"}, {"name": "b", "action": "x"}]
    bodies = nested("two") | {
        "one": Definition.model_validate({"name": "one", "stages": stages, "variables": {"k": 0}}).canonical()
    }
    await ledger.coordinating([Begin("w", "one", bodies)])
    end = events.Ended(stage="s", index=None, attempt=1, status=Status.COMPLETED, workflow_variables={"k": 1})
    await ledger.coordinating([JobEnded(key_of("w:s:1"), end)])
    request = (await posted(ledger, "t.jobs"))[-1]
    assert request["executionId"] == "w:b:1"
    assert (request["jobContextVariables"], request["workflowContextVariables"]) == ({"k": 1}, {"k": 0})


async def test_a_workflow_within_that_somebody_cancels_fails_its_stage_and_says_why(
    ledger: SqlLedger, url: str
) -> None:
    await ledger.coordinating([Begin("w", "one", nested("one", "two"))])
    cancel = Control.model_validate({"command": "cancel", "workflowId": "w:s:1", "reason": "wrong file"})
    await ledger.coordinating([WorkflowCommand(cancel)])
    await ledger.coordinating([ended(key_of("w:s:1"), "s", status=Status.CANCELLED)])
    assert WorkflowReader(url).find("w").state.message == "stage s: Cancelled: wrong file"


async def test_a_workflow_within_begins_with_the_one_around_it_whose_turn_comes(ledger: SqlLedger) -> None:
    one, two = (Definition.model_validate_json(body) for body in nested("one", "two").values())
    first = one.model_copy(update={"concurrency": 1})
    bodies = {each.name: each.canonical() for each in (first, two)}
    await ledger.coordinating([Begin("w-1", "one", bodies), Begin("w-2", "one", bodies)])
    assert await asked(ledger) == [f"{key_of('w-1:s:1')}:s:1"]
    await ledger.coordinating([ended(key_of("w-1:s:1"), "s")])
    assert await asked(ledger) == [f"{key_of(f'{name}:s:1')}:s:1" for name in ("w-1", "w-2")]


async def test_workflows_are_not_within_one_another_for_ever(ledger: SqlLedger, url: str) -> None:
    names = [f"w{number}" for number in range(11)]
    await ledger.coordinating([Begin("w", "w0", nested(*names))])
    assert "10 workflows within one another are allowed" in WorkflowReader(url).find("w").state.message
    assert await asked(ledger) == []
    await ledger.coordinating([Begin("most", "w1", nested(*names[1:]))])
    assert len(await asked(ledger)) == 1


async def test_a_workflow_within_is_given_no_more_than_one_may_have(ledger: SqlLedger, url: str) -> None:
    """Its stage fails, and says why; what may be is kept and read again."""
    inner = {"name": "two", "stages": [{"name": "s", "action": "x"}], "variables": {"k": 0}}
    outer = {
        "name": "one",
        "variables": {"k": 0},
        "stages": [
            {"name": "a", "action": "x"},
            {"name": "s", "workflow": "two", "variables": {"k": ["{{ job.k }}"]}},
        ],
    }
    bodies = {str(each["name"]): Definition.model_validate(each).canonical() for each in (outer, inner)}
    value: Any = 1
    for _ in range(98):
        value = [value]
    for name, given in (("fits", value), ("beyond", [value])):
        await ledger.coordinating([Begin(name, "one", bodies)])
        end = events.Ended(
            stage="a", index=None, attempt=1, status=Status.COMPLETED, job_variables={"k": given}
        )
        await ledger.coordinating([JobEnded(name, end)])
    reader = WorkflowReader(url)
    assert reader.find("fits:s:1").state.context == {"k": [value]}
    said = "stage s: RequestRefused: variables: they nest deeper than 100 levels"
    assert reader.find("beyond").state.message == said


async def test_a_workflow_within_does_not_take_the_id_of_another(ledger: SqlLedger, url: str) -> None:
    """Whoever has it already goes on; the stage fails, and says why."""
    await ledger.coordinating([begin("w:s:1")])
    await ledger.coordinating([Begin("w", "one", nested("one", "two"))])
    reader = WorkflowReader(url)
    assert reader.find("w").state.message == "stage s: RequestRefused: there is a workflow 'w:s:1' already"
    assert reader.find("w:s:1").name == "row"


async def test_a_cancel_goes_down_and_its_end_comes_up(ledger: SqlLedger, url: str) -> None:
    await ledger.coordinating([Begin("w", "one", nested("one", "two"))])
    cancel = Control.model_validate({"command": "cancel", "workflowId": "w", "reason": "why"})
    await ledger.coordinating([WorkflowCommand(cancel)])
    [command] = await posted(ledger, "")
    assert (command["executionId"], command["reason"], command["force"]) == (
        f"{key_of('w:s:1')}:s:1",
        "why",
        False,
    )
    by_force = Control.model_validate({"command": "cancel", "workflowId": "w", "force": True})
    await ledger.coordinating([WorkflowCommand(by_force)])
    assert [command["force"] for command in await posted(ledger, "")] == [False, True]
    await ledger.coordinating([ended(key_of("w:s:1"), "s", status=Status.CANCELLED)])
    reader = WorkflowReader(url)
    actors = [entry.actor for entry in reader.history("w:s:1") if entry.event == "CancelRequested"]
    assert actors == ["workflow", "workflow"]
    assert [reader.find(each).state.status.value for each in ("w", "w:s:1")] == ["CANCELLED", "CANCELLED"]


async def test_an_unheard_end_that_leads_to_what_cannot_be_read_keeps_no_coordinator_from_its_work(
    ledger: SqlLedger, url: str
) -> None:
    """The workflow around it is left as it is; others go on."""
    bodies = nested("one", "two")
    await ledger.coordinating([Begin(name, "one", bodies) for name in ("w-1", "w-2")])
    jobs = await asked(ledger)
    for job in jobs:
        await ledger.accept([Arrival(Execution(job, "x", token="t"), json.dumps({"executionId": job}))])
        await ledger.claim(Capacity(1, {"x": 1}))
        await ledger.apply(job, 1, [Completed()])
    with open_engine(url).begin() as connection:
        spoilt = connection.execute(text("UPDATE workflows SET state = '{' WHERE workflow_id = 'w-1'"))
    assert spoilt.rowcount == 1
    await ledger.reconcile_workflows()
    reader = WorkflowReader(url)
    assert reader.find("w-2").state.status is Status.COMPLETED
    assert reader.find("w-1:s:1").state.status is Status.RUNNING
