"""Workflows in a real ledger: state, requests and what is told in one step; reconciled, purged, one after the other."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from jef_daemon.errors import NotFound, RequestRefused
from jef_daemon.events import Completed, Failed
from jef_daemon.ledger import SqlLedger
from jef_daemon.ledger.opening import open_engine
from jef_daemon.ledger.purging import Finished, count_finished, purge_finished
from jef_daemon.ledger.workflow_reading import WorkflowReader
from jef_daemon.lifecycle import Execution, Status
from jef_daemon.messages import Control
from jef_daemon.names import Names
from jef_daemon.ports import Arrival, Capacity, Command, Delivery, Refusal
from jef_daemon.workflow import course, events, law
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.inputs import Became, Begin, JobEnded, RefusedRequest, WorkflowCommand
from jef_daemon.workflow.plan import PlanError, plan
from jef_daemon.workflow.step import Step
from tests.support.clock import ManualClock
from tests.support.kept_workflows import ROW, asked, begin, ended, posted


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


async def test_a_change_its_requests_and_what_is_told_are_one_step(ledger: SqlLedger, url: str) -> None:
    assert await ledger.coordinating([begin("w"), begin("w")]) == [Became.NEW, Became.KNOWN]
    assert await asked(ledger) == ["w:a:1"]
    assert await ledger.coordinating([ended("w", "a"), ended("w", "a")]) == [Became.TAKEN, Became.IGNORED]
    assert await asked(ledger) == ["w:a:1", "w:b:1"]
    assert await ledger.coordinating([ended("nobody", "a")]) == [Became.IGNORED]
    await ledger.coordinating([ended("w", "b")])
    assert not any("traceparent" in (each.headers or {}) for each in await ledger.outbox(0, 100))
    told = await posted(ledger, "t.workflow-status")
    assert [each["status"] for each in told] == ["QUEUED", "RUNNING", "RUNNING", "COMPLETED"]
    assert [each["sequence"] for each in told] == [1, 2, 3, 4]
    assert [each["progress"] for each in told] == [0, 0, 50, 100]
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


async def test_the_end_of_a_workflow_is_told_again_to_whoever_asks_again(ledger: SqlLedger) -> None:
    """As it was told, with its number: whoever missed it has it now, and nobody takes it for another."""
    await ledger.coordinating([begin("w")])
    await ledger.coordinating([ended("w", "a"), ended("w", "b")])
    told = await posted(ledger, "t.workflow-status")
    assert await ledger.coordinating([begin("w")]) == [Became.KNOWN]
    again = (await posted(ledger, "t.workflow-status"))[len(told) :]
    assert again == told[-1:]
    assert await asked(ledger) == ["w:a:1", "w:b:1"]


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


async def test_lost_ends_are_found_among_as_many_as_there_are(ledger: SqlLedger) -> None:
    """Also behind what one look takes."""
    many = {**ROW, "concurrency": None}
    await ledger.coordinating([begin(f"w-{number}", many) for number in range(401)])
    for number in (0, 199, 200, 400):
        await run_here(ledger, f"w-{number}:a:1", Completed())
    await ledger.reconcile_workflows()
    assert (await asked(ledger))[401:] == [f"w-{number}:b:1" for number in (0, 199, 200, 400)]


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


async def test_workflows_are_purged_from_outside_a_daemon_too(
    ledger: SqlLedger, url: str, clock: ManualClock
) -> None:
    """As `jef purge` does it, in steps; open ones stay, and what they are pinned to."""
    clock.time = time.time() - 1000
    many = {**ROW, "concurrency": 1000}
    await ledger.coordinating([begin(f"w-{number}", many) for number in range(600)])
    await ledger.coordinating([ended(f"w-{number}", "a", status=Status.FAILED) for number in range(1, 600)])
    before = time.time() - 500
    assert count_finished(url, before - 1000) == Finished()
    assert str(count_finished(url, before)) == "0 executions and 599 workflows"
    steps = list(purge_finished(url, before))
    assert steps == [Finished(workflows=500), Finished(workflows=99)]
    reader = WorkflowReader(url)
    assert [kept.state.workflow_id for kept in reader.page([], None, 10)[0]] == ["w-0"]
    assert list(reader.history("w-1")) == []
    assert definitions(url) == {Definition.model_validate(many).revision}


async def test_a_definition_is_kept_for_a_workflow_within_that_has_not_begun(
    ledger: SqlLedger, url: str, clock: ManualClock
) -> None:
    """However long what comes before it takes; a definition that none needs any more is purged."""
    inner = Definition.model_validate({**ROW, "name": "inner"})
    stages = [{"name": "a", "action": "x"}, {"name": "i", "workflow": "inner"}]
    outer = Definition.model_validate({"name": "outer", "stages": stages})
    await ledger.coordinating([Begin("w", "outer", {each.name: each.canonical() for each in (outer, inner)})])
    clock.time += 1000
    await ledger.coordinating([begin("other")])
    await ledger.purge(clock.time, 10)
    assert definitions(url) == {inner.revision, outer.revision, Definition.model_validate(ROW).revision}
    await ledger.coordinating(
        [ended("w", "a", status=Status.FAILED), ended("other", "a", status=Status.FAILED)]
    )
    clock.time += 1000
    await ledger.purge(clock.time, 10)
    assert definitions(url) == set()


def definitions(url: str) -> set[str]:
    engine = open_engine(url, read_only=True)
    with engine.connect() as connection:
        found = set(connection.scalars(text("SELECT revision FROM workflow_definitions")))
    engine.dispose()
    return found


async def test_what_is_no_workflow_is_a_dead_letter_and_told_once(ledger: SqlLedger) -> None:
    """Told where its id can be read, unless there is a workflow of this id: that one has not failed."""
    error = RequestRefused("workflow-invalid", "there is no workflow 'x'")
    delivery = Delivery("workflows", b"{}", 1, 1, routing_key="t.workflows")
    refusal = Refusal(error, delivery, "workflows")
    await ledger.coordinating([begin("known")])
    refused = [RefusedRequest(refusal, name, "x") for name in ("known", "new", None)]
    assert await ledger.coordinating(refused) == [Became.REFUSED] * 3
    letters = [each for each in await ledger.outbox(0, 100) if each.exchange == "t.dead"]
    assert [(each.headers or {})["x-jef-reason"] for each in letters] == ["workflow-invalid"] * 3
    outbox = [each for each in await ledger.outbox(0, 100) if each.exchange == "t.workflow-status"]
    [told] = [json.loads(each.body) for each in outbox if each.routing_key == "x.failed"]
    assert (told["workflowId"], told["status"]) == ("new", "FAILED")
    assert told["message"] == "workflow-invalid: there is no workflow 'x'"


async def test_a_cancel_that_came_first_is_applied_and_keeps_its_words(ledger: SqlLedger, url: str) -> None:
    """Also where it would have had to wait for its turn: it leaves that at once."""
    cancel = Control.model_validate(
        {"command": "cancel", "workflowId": "w-2", "reason": "not wanted", "by": "ann"}
    )
    await ledger.commanding([Command(cancel, actor="operator:ann")])
    await ledger.coordinating([begin("w-1"), begin("w-2"), begin("w-3")])
    reader = WorkflowReader(url)
    assert [reader.find(f"w-{number}").state.status.value for number in (1, 2, 3)] == [
        *("RUNNING", "CANCELLED", "QUEUED")
    ]
    assert reader.find("w-2").state.message == "not wanted"
    assert [entry.actor for entry in reader.history("w-2") if entry.event == "CancelRequested"] == [
        "operator:ann"
    ]


async def test_the_coordinator_answers_for_its_workflow(ledger: SqlLedger, url: str) -> None:
    """The command is told to both, but what to resume only the ledger knows; and no cancel is left for later."""
    await ledger.coordinating([begin("w")])
    for command, name, answers in (
        *(("cancel", "w", 0), ("retry", "w", 0), ("resume", "w", 1)),
        ("retry", "a producer's own", 1),
    ):
        control = Control.model_validate({"command": command, "workflowId": name})
        assert len((await ledger.commanding([Command(control)])).answers) == answers
    with open_engine(url).connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM tombstones")).scalar() == 0


async def test_a_cancel_of_a_job_is_none_of_the_workflow_of_that_name(ledger: SqlLedger, url: str) -> None:
    cancel = Control.model_validate({"command": "cancel", "executionId": "w"})
    await ledger.commanding([Command(cancel)])
    await ledger.coordinating([begin("w")])
    assert WorkflowReader(url).find("w").state.status is Status.RUNNING


async def test_a_cancel_that_came_long_before_is_forgotten(
    ledger: SqlLedger, url: str, clock: ManualClock
) -> None:
    """After a day by default: who begins a workflow of that name then means another."""
    cancel = Control.model_validate({"command": "cancel", "workflowId": "w"})
    await ledger.commanding([Command(cancel, actor="operator:ann")])
    clock.time += 86_401
    await ledger.coordinating([begin("w")])
    assert WorkflowReader(url).find("w").state.status.value == "RUNNING"


async def test_what_is_over_as_it_comes_is_purged_too(
    ledger: SqlLedger, url: str, clock: ManualClock
) -> None:
    cancel = Control.model_validate({"command": "cancel", "workflowId": "w"})
    await ledger.commanding([Command(cancel, actor="operator:ann")])
    await ledger.coordinating([begin("w"), begin("other")])
    clock.time += 100
    await ledger.purge(clock.time, 10)
    reader = WorkflowReader(url)
    with pytest.raises(NotFound):
        reader.find("w")
    assert [entry.event for entry in reader.history("other")][:2] == ["Accepted", "Begun"]


async def test_commands_are_answered_and_say_why_not(ledger: SqlLedger) -> None:
    """For what is here; another coordinator, or nobody, answers for the rest."""
    await ledger.coordinating([begin("w")])
    commands = [("retry", "w"), ("cancel", "nobody"), ("resume", "w"), ("cancel", "w"), ("cancel", "w")]
    inputs = [
        WorkflowCommand(
            Control.model_validate({"command": word, "workflowId": name}),
            "asker" if place != 3 else None,
            str(place),
        )
        for place, (word, name) in enumerate(commands)
    ]
    became = await ledger.coordinating(inputs)
    assert became == [Became.REFUSED, Became.IGNORED, Became.IGNORED, Became.TAKEN, Became.REFUSED]
    answers = [each for each in await ledger.outbox(0, 100) if each.routing_key == "asker"]
    assert [(each.correlation_id, json.loads(each.body)) for each in answers] == [
        (
            "0",
            {"accepted": False, "status": "RUNNING", "reason": "it is RUNNING: only a FAILED one is retried"},
        ),
        (
            "4",
            {
                "accepted": False,
                "status": "RUNNING",
                "reason": "it is being cancelled already; force does not wait",
            },
        ),
    ]


async def test_a_command_takes_along_who_gave_it_why_and_how(ledger: SqlLedger, url: str) -> None:
    await ledger.coordinating([begin("w")])
    await ledger.coordinating([ended("w", "a", status=Status.FAILED)])
    retry = {"command": "retry", "reason": "mended", "configuration": {"a": {"more": 1}}}
    cancel = {"command": "cancel", "reason": "wrong file", "force": True}
    for words in (retry, cancel):
        control = Control.model_validate({"workflowId": "w", "by": "ann", **words})
        assert await ledger.coordinating([WorkflowCommand(control)]) == [Became.TAKEN]
    assert (await posted(ledger, "t.jobs"))[-1]["configuration"] == {"more": 1}
    assert await posted(ledger, "") == [
        {
            "command": "cancel",
            "executionId": "w:a:2",
            "reason": "wrong file",
            "force": True,
            "by": "workflow w",
        }
    ]
    history = [(entry.event, entry.actor, entry.reason) for entry in WorkflowReader(url).history("w")]
    assert history[0] == ("Accepted", "producer", "")
    assert ("Retried", "operator:ann", "mended") in history
    assert ("CancelRequested", "operator:ann", "wrong file") in history


async def test_a_command_to_a_job_is_no_longer_than_it_may_be(ledger: SqlLedger) -> None:
    """However long the words and the id are that somebody chose: one that is refused would stop nothing."""
    longest = {"workflowId": "w" * 255, "reason": "r" * 1000}
    await ledger.coordinating([begin(longest["workflowId"])])
    await ledger.coordinating([WorkflowCommand(Control.model_validate({"command": "cancel", **longest}))])
    [command] = await posted(ledger, "")
    Control.model_validate(command)
    assert (command["reason"], command["by"]) == (longest["reason"], f"workflow {'w' * 246}")


async def test_an_answer_tells_the_status_after_all_that_follows_at_once(ledger: SqlLedger) -> None:
    await ledger.coordinating([begin("w", {**ROW, "concurrency": None})])
    await ledger.coordinating([ended("w", "a", status=Status.FAILED)])
    retry = Control.model_validate({"command": "retry", "workflowId": "w"})
    await ledger.coordinating([WorkflowCommand(retry, "asker")])
    assert await posted(ledger, "") == [{"accepted": True, "status": "RUNNING", "reason": None}]


async def test_a_fault_of_the_law_is_the_end_of_one_workflow_and_a_retry_goes_on(
    ledger: SqlLedger, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as it was before, but FAILED, its jobs stopped; the others of the batch go on."""
    stages = [{"name": "a", "action": "x"}, {"name": "b", "action": "x"}]
    stages.append({"name": "c", "action": "x", "needs": []})  # type: ignore[dict-item]  # beside the others
    spelled = {"name": "fork", "stages": stages}
    await ledger.coordinating([begin(name, spelled) for name in ("bad", "good")])
    right, meets = course.settle, Status.RUNNING

    def wrong(step: Step) -> None:
        right(step)
        if (step.state.workflow_id, step.state.status, step.state.error) == ("bad", meets, None):
            raise KeyError("a fault")

    monkeypatch.setattr(law, "settle", wrong)
    ends = [ended(name, "a") for name in ("bad", "good")]
    assert await ledger.coordinating(ends) == [Became.TAKEN, Became.TAKEN]
    assert (await asked(ledger))[4:] == ["good:b:1"]
    found = WorkflowReader(url).find("bad").state
    assert (found.status, found.message) == (Status.RUNNING, "the coordinator cannot go on: c")
    stopped = [each["executionId"] for each in await posted(ledger, "") if each["command"] == "cancel"]
    assert stopped == ["bad:c:1"], "a has ended, nobody will tell it again; what c uses is held so long"
    await ledger.coordinating([ended("bad", "c", status=Status.CANCELLED)])
    found = WorkflowReader(url).find("bad").state
    said = "CoordinatorFault: a fault of the coordinator, whose log says more: KeyError: 'a fault'"
    assert (found.status, found.message) == (Status.FAILED, said)
    assert [stage.phase for stage in found.stages.values()] == ["CANCELLED", "NOT_RUN", "CANCELLED"]
    again = WorkflowCommand(Control.model_validate({"command": "retry", "workflowId": "bad"}))
    assert await ledger.coordinating([again]) == [Became.TAKEN]
    assert WorkflowReader(url).find("bad").state.message == said, "it met the fault again"
    meets = Status.QUEUED
    assert await ledger.coordinating([again]) == [Became.REFUSED]
    monkeypatch.setattr(law, "settle", right)
    await ledger.coordinating([again])
    assert (await asked(ledger))[5:] == ["bad:a:2", "bad:c:2"]
    await ledger.coordinating([ended("bad", "a", 2), ended("bad", "b"), ended("bad", "c", 2)])
    assert WorkflowReader(url).find("bad").state.status is Status.COMPLETED


async def test_a_workflow_that_meets_the_fault_in_whatever_it_does_ends_at_once(
    ledger: SqlLedger, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it would only wait for its jobs: they are stopped, and nobody waits."""
    stages = [{"name": "a", "action": "x", "forEach": [1, 2, 3], "limit": 2}, {"name": "b", "action": "x"}]
    await ledger.coordinating([begin("w", {"name": "fork", "stages": stages})])
    right = course.settle

    def wrong(step: Step) -> None:
        right(step)
        if step.state.status is Status.RUNNING:
            raise KeyError("a fault")

    monkeypatch.setattr(law, "settle", wrong)
    end = events.Ended(stage="a", index=1, attempt=1, status=Status.COMPLETED)
    assert await ledger.coordinating([JobEnded("w", end)]) == [Became.TAKEN]
    found = WorkflowReader(url).find("w").state
    assert (found.status, found.error and found.error["type"]) == (Status.FAILED, "CoordinatorFault")
    phases = {name: (stage.phase, [run.phase for run in stage.runs]) for name, stage in found.stages.items()}
    assert phases == {"a": ("CANCELLED", ["CANCELLED", "CANCELLED", "NOT_RUN"]), "b": ("NOT_RUN", [])}
    assert [each["executionId"] for each in await posted(ledger, "")] == ["w:a.0:1"]


async def test_what_was_taken_before_the_fault_in_the_same_transaction_stays(
    ledger: SqlLedger, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what the fault came with is taken back: also of a workflow that has changed meanwhile, or is new."""
    stages: list[dict[str, object]] = [{"name": name, "action": "x", "needs": []} for name in ("a", "b", "c")]
    right = course.settle

    def wrong(step: Step) -> None:
        right(step)
        if step.state.stages["b"].phase == "COMPLETED" and step.state.error is None:
            raise KeyError("a fault")

    monkeypatch.setattr(law, "settle", wrong)
    began = begin("w", {"name": "fork", "stages": stages})
    assert await ledger.coordinating([began, ended("w", "a"), ended("w", "b")]) == [
        Became.NEW,
        Became.TAKEN,
        Became.TAKEN,
    ]
    found = WorkflowReader(url).find("w").state
    assert [stage.phase for stage in found.stages.values()] == ["COMPLETED", "CANCELLED", "RUNNING"]


async def test_a_workflow_that_cannot_be_read_keeps_no_other_of_its_name_from_beginning(
    ledger: SqlLedger, url: str
) -> None:
    """Nor what came, the end of another one, from being taken."""
    await ledger.coordinating([begin("w-1"), begin("w-2"), begin("w-3")])
    spoil(url, "workflows SET state = '{' WHERE workflow_id = 'w-2'")
    ends = [ended("w-1", "a"), ended("w-1", "b")]
    assert await ledger.coordinating(ends) == [Became.TAKEN, Became.TAKEN]
    assert (await asked(ledger))[2:] == ["w-3:a:1"]
    shown, _ = WorkflowReader(url).page((), None, 10)
    assert [kept.state.workflow_id for kept in shown] == ["w-3", "w-2", "w-1"]
    found = WorkflowReader(url).find("w-2").state
    assert (found.status, found.message.partition(":")[0]) == (Status.QUEUED, "it cannot be read")


async def test_definitions_hold_for_those_that_have_them_whatever_is_refused_by_now(
    ledger: SqlLedger, url: str
) -> None:
    """A version that is stricter goes on with what an earlier one began; what it cannot read keeps it from nothing."""
    deep: dict[str, object] = {}
    for _ in range(110):
        deep = {"k": deep}
    spelled = {"name": "deep", "stages": [{"name": "a", "action": "y"}, {"name": "b", "action": "z"}]}
    spelled["stages"][1]["configuration"] = deep  # type: ignore[index]
    with pytest.raises(PlanError):
        plan(Definition.model_validate(spelled))
    await ledger.coordinating([begin("w", spelled), begin("other")])
    assert await ledger.coordinating([ended("w", "a")]) == [Became.TAKEN]
    assert WorkflowReader(url).find("w").state.message.endswith("would nest deeper than 100 levels")
    assert await ledger.workflow_actions() == {"x", "y", "z"}
    spoil(url, "workflow_definitions SET body = '{' WHERE name = 'deep'")
    assert await ledger.workflow_actions() == {"x"}


def spoil(url: str, change: str) -> None:
    with open_engine(url).begin() as connection:
        assert connection.execute(text(f"UPDATE {change}")).rowcount == 1


async def test_a_workflow_that_meets_a_fault_as_it_begins_is_told_as_failed(
    ledger: SqlLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the very transaction that it came in."""
    right = course.settle

    def wrong(step: Step) -> None:
        if step.state.error is None:
            step.state.stages.clear()
            raise RecursionError("too deep")
        right(step)

    monkeypatch.setattr(law, "settle", wrong)
    assert await ledger.coordinating([begin("w")]) == [Became.NEW]
    told = await posted(ledger, "t.workflow-status")
    assert [each["status"] for each in told] == ["QUEUED", "FAILED"]
    assert told[-1]["error"]["message"].endswith("RecursionError: too deep")
    assert [each["status"] for each in told[-1]["stages"]] == ["NOT_RUN", "NOT_RUN"]


async def test_no_statement_looks_at_all_workflows(ledger: SqlLedger, url: str, clock: ManualClock) -> None:
    """Whatever is done to one of them, or to one of a few that may run: there may be 100,000."""
    statements: set[str] = set()
    written = await ledger._other(lambda transaction: transaction.connection.connection.dbapi_connection)
    written.set_trace_callback(statements.add)  # the database's own word: also what goes past SQLAlchemy
    await ledger.coordinating([begin("w-1"), begin("w-2"), begin("w-3", {**ROW, "name": "other"})])
    await ledger.coordinating([ended("w-1", "a"), ended("w-1", "b"), ended("w-3", "a", status=Status.FAILED)])
    cancel = Control.model_validate({"command": "cancel", "workflowId": "w-2"})
    await ledger.coordinating([WorkflowCommand(cancel)])
    await ledger.reconcile_workflows()
    await ledger.go_on_locking(0)
    clock.time += 100
    await ledger.purge(clock.time - 50, 10)
    looked = [each for each in statements if "workflows" in each and not each.startswith("INSERT")]
    assert len(looked) > 8
    plans = {each: plan_of_query(url, each) for each in looked}
    scans = {each: plan for each, plan in plans.items() if "SCAN workflows" in plan}
    # In the order of its primary key, for the first row: that is no look at all of them.
    assert all("LIMIT" in each and "ORDER BY workflows.number" in each for each in scans), scans
    counts = [plan for each, plan in plans.items() if "count(*)" in each]
    assert len(counts) > 1
    assert all(
        "workflows_running (name=?" in plan or "workflows_waiting_for_lock (name=?" in plan for plan in counts
    )


def plan_of_query(url: str, statement: str) -> str:
    engine = open_engine(url, read_only=True)
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}").all()
    engine.dispose()
    return "; ".join(str(row[3]) for row in rows)
