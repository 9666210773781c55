"""The coordinator's custody: a message is acknowledged behind the ledger; ends are heard before jobs are asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import pytest

from jef_daemon.names import Names
from jef_daemon.ports import Delivery
from jef_daemon.workflow.coordinator import Coordinator
from jef_daemon.workflow.inputs import Became, Begin, Input, JobEnded, RefusedRequest, WorkflowCommand
from jef_daemon.workflow.library import Library
from jef_daemon.workflow.state import Bounds


class Slow:
    """A ledger that is on disk when the test says so, and a bus that remembers the order of things."""

    session = 1

    def __init__(self) -> None:
        self.done: list[str] = []
        self.taken = asyncio.Event()
        self.on_disk: asyncio.Future[list[Became]] = asyncio.get_running_loop().create_future()
        self.inputs: list[Input] = []
        self.workflow_bounds = Bounds()

    def coordinating(self, inputs: Sequence[Input]) -> asyncio.Future[list[Became]]:
        self.done.append("given to the ledger")
        self.inputs += inputs
        self.taken.set()
        return self.on_disk

    async def reconcile_workflows(self) -> None:
        self.done.append("reconciled")

    async def workflow_actions(self) -> set[str]:
        return {"pinned"}

    async def bind(self, queue: str, exchange: str, routing_keys: Iterable[str]) -> None:
        self.done += [f"bound {key}" for key in routing_keys if key.endswith(".completed")]

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self.done.append("acknowledged")


@pytest.fixture
async def slow() -> Slow:
    return Slow()


@pytest.fixture
async def coordinator(slow: Slow, tmp_path: Path) -> AsyncIterator[Coordinator]:
    (tmp_path / "w.yaml").write_text("name: w\nstages: [{name: a, action: x}]\n")
    made = Coordinator(slow, slow, Names("t"), Library(tmp_path), 10_000)
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    await asyncio.wait({running})


REQUEST = {"workflowId": "w-1", "workflow": "w"}
END = {"executionId": "w-1:a:1", "status": "COMPLETED"}
CANCEL = {"command": "cancel", "workflowId": "w-1"}


@pytest.mark.parametrize(
    ("body", "headers", "is_request"),
    [(REQUEST, {}, True), ({}, {}, True), (END, {}, False), (CANCEL, {"x-jef-kind": "control"}, False)],
    ids=["request", "dead letter", "end of a job", "command"],
)
async def test_nothing_is_acknowledged_before_it_is_on_disk(
    coordinator: Coordinator, slow: Slow, body: dict[str, str], headers: dict[str, str], is_request: bool
) -> None:
    """However long that takes: the loop goes round and round, and nobody acknowledges."""
    inbox = coordinator.requests if is_request else coordinator.events
    inbox.deliver(Delivery("w", json.dumps(body).encode(), 1, 1, headers=headers))
    await slow.taken.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert "acknowledged" not in slow.done
    slow.on_disk.set_result([Became.TAKEN])
    await inbox.finish()
    assert slow.done[-2:] == ["given to the ledger", "acknowledged"]


async def test_ends_are_heard_before_a_job_is_asked_for(coordinator: Coordinator, slow: Slow) -> None:
    """Those of workflows from before, before they are looked at; those of a new one before the ledger has it."""
    slow.on_disk.set_result([Became.NEW])
    for number in range(2):
        body = json.dumps({**REQUEST, "workflowId": f"w-{number}"}).encode()
        coordinator.requests.deliver(Delivery("w", body, number, 1))
        await coordinator.requests.finish()
    assert slow.done == [
        *("bound pinned.completed", "reconciled"),
        *("bound x.completed", "given to the ledger", "acknowledged"),
        *("given to the ledger", "acknowledged"),
    ]


async def test_a_request_with_too_much_is_refused_before_it_begins(
    coordinator: Coordinator, slow: Slow
) -> None:
    """Not by its first stage, after hours."""
    slow.on_disk.set_result([Became.REFUSED, Became.NEW])
    slow.workflow_bounds = Bounds(variables_bytes=20)
    for room in (13, 12):
        body = json.dumps({**REQUEST, "variables": {"k": "x" * room}}).encode()
        coordinator.requests.deliver(Delivery("w", body, room, 1))
    await coordinator.requests.finish()
    refused, taken = slow.inputs
    assert isinstance(refused, RefusedRequest)
    said = "variables: the workflow's variables would have 21 bytes; 20 are allowed"
    assert (refused.refusal.error.code, refused.refusal.error.detail) == ("field-invalid", said)
    assert isinstance(taken, Begin)


async def test_what_concerns_no_workflow_costs_nothing(coordinator: Coordinator, slow: Slow) -> None:
    """It is acknowledged, and the ledger is not asked."""
    slow.on_disk.set_result([])
    strange = [b"no JSON", b"{}", b'{"executionId": "624", "status": "COMPLETED"}', b"[]"]
    resume = json.dumps({"command": "resume", "workflowId": "w-1"}).encode()
    for each in strange:
        coordinator.events.deliver(Delivery("w", each, 1, 1))
    for each in (resume, b"{}", b'{"command": "cancel", "executionId": "624"}'):
        coordinator.events.deliver(Delivery("w", each, 1, 1, headers={"x-jef-kind": "control"}))
    coordinator.events.deliver(Delivery("w", resume, 1, 1, headers={"x-jef-kind": "unknown"}))
    await coordinator.events.finish()
    assert set(slow.done) == {"bound pinned.completed", "reconciled", "acknowledged"}
    for body, headers in ((END, {}), (CANCEL, {"x-jef-kind": "control"})):
        coordinator.events.deliver(Delivery("w", json.dumps(body).encode(), 2, 1, headers=headers))
    await coordinator.events.finish()
    assert [type(each) for each in slow.inputs] == [JobEnded, WorkflowCommand]
