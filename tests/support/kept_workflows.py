"""Workflows in a ledger, as contract tests begin them, end their jobs, and look at what is to be published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jef_daemon.ledger import SqlLedger
from jef_daemon.lifecycle import Status
from jef_daemon.workflow import events
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.inputs import Begin, JobEnded

ROW = {
    "name": "row",
    "concurrency": 1,
    "stages": [{"name": "a", "action": "x"}, {"name": "b", "action": "x"}],
}
"""Two stages, one workflow at a time."""


def begin(workflow_id: str, definition: Mapping[str, Any] = ROW, **more: Any) -> Begin:
    """A request, with the definition that was found."""
    body = Definition.model_validate(definition).canonical()
    return Begin(workflow_id, definition["name"], {definition["name"]: body}, **more)


def ended(key: str, stage: str, attempt: int = 1, status: Status = Status.COMPLETED) -> JobEnded:
    """The end of a stage's job."""
    return JobEnded(key, events.Ended(stage=stage, index=None, attempt=attempt, status=status))


async def posted(ledger: SqlLedger, exchange: str) -> list[dict[str, Any]]:
    """What waits to be published to an exchange."""
    return [json.loads(each.body) for each in await ledger.outbox(0, 10_000) if each.exchange == exchange]


async def asked(ledger: SqlLedger) -> list[str]:
    """Execution ids of the jobs that were asked for, in order."""
    return [request["executionId"] for request in await posted(ledger, "t.jobs")]


def nested(*names: str) -> dict[str, str]:
    """Workflows within one another, the first around all; the last has a job."""
    found = {}
    for name, inner in zip(names, (*names[1:], None), strict=True):
        stage = {"name": "s", "action": "x"} if inner is None else {"name": "s", "workflow": inner}
        found[name] = Definition.model_validate({"name": name, "stages": [stage]}).canonical()
    return found
