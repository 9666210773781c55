"""The workflows that one transaction changes: each is read once, written once; their history; their definitions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, insert, select, update

from jef_daemon.ledger import schema
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.workflow import events, messages
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.plan import Plan, plan_of
from jef_daemon.workflow.state import State, decode, encode

_AT_ONCE = 200
"""Ids in one look."""

_W, _D = schema.workflows.c, schema.workflow_definitions.c
_CHANGING = ("status", "updated_at", "finished_at", "due_at", "state")
_INSERT = insert(schema.workflows)
_UPDATE = (
    update(schema.workflows)
    .where(_W.number == bindparam("which"))
    .values({name: bindparam(f"new_{name}") for name in _CHANGING})
)
_INSERT_HISTORY = insert(schema.workflow_history)


@dataclass(slots=True)
class Workflow:
    """One that is being changed."""

    number: int
    """0: it is new."""
    name: str
    revision: str
    plan: Plan
    state: State


class WorkflowBook:
    """Workflows inside a transaction.

    Args:
        transaction: to be committed by the caller.
    """

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        self._connection = transaction.connection
        self.open: dict[str, Workflow] = {}
        """Those that were read, by key."""
        self._changed: dict[str, Workflow] = {}
        self._history: list[dict[str, Any]] = []
        self._kept: set[str] = set()
        """Revisions of definitions that are known to be kept: thousands may begin with one."""

    def add(self, workflow: Workflow) -> None:
        """Take a new one in."""
        self.open[workflow.state.key] = workflow
        self.change(workflow)

    def change(self, workflow: Workflow) -> None:
        """Have it written."""
        self._changed[workflow.state.key] = workflow

    def read(self, keys: Iterable[str]) -> None:
        """Read workflows that were not read yet; those that are not there stay away."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self.open]
        columns = (_W.number, _W.key, _W.name, _W.revision, _W.state, _W.due_at)
        for start in range(0, len(wanted), _AT_ONCE):
            some = _W.key.in_(wanted[start : start + _AT_ONCE])
            for row in self._connection.execute(select(*columns).where(some)):
                plan = plan_of(body_of(self._transaction, row.revision))
                state = decode(row.state)
                state.due_at = row.due_at  # it is moved when the wall clock is set
                self.open[row.key] = Workflow(row.number, row.name, row.revision, plan, state)

    def write(self) -> None:
        """Write what has changed."""
        changed, self._changed = self._changed, {}
        new = [each for each in changed.values() if not each.number]
        old = [each for each in changed.values() if each.number]
        now = self._transaction.now
        if old:
            self._connection.execute(
                _UPDATE,
                [
                    {
                        "which": each.number,
                        "new_status": each.state.status.value,
                        "new_updated_at": now,
                        "new_finished_at": each.state.finished_at,
                        "new_due_at": each.state.due_at,
                        "new_state": encode(each.state),
                    }
                    for each in old
                ],
            )
        for each in new:
            row = _row(each, now)
            (each.number,) = self._connection.execute(_INSERT.returning(_W.number), row).one()

    def close(self) -> None:
        """Write all that is left to write."""
        self.write()
        if self._history:
            self._transaction.driver.change(_INSERT_HISTORY, *self._history)

    def note(self, workflow: Workflow, noted: events.Noted) -> None:
        """Add a line to the history of a workflow."""
        self._history.append(
            {
                "workflow_id": workflow.state.workflow_id,
                "at": self._transaction.now,
                "event": noted.event,
                "stage": noted.stage,
                "actor": noted.actor,
                "reason": noted.reason,
            }
        )

    def tell(self, workflow: Workflow) -> None:
        """Notify of a workflow as it stands."""
        state, transaction = workflow.state, self._transaction
        body = messages.notification(state, workflow.name, workflow.revision, transaction.now)
        key = messages.routing_key(workflow.name, state.status)
        headers = {"traceparent": state.traceparent} if state.traceparent else None
        transaction.post(transaction.names.workflow_status, key, body, headers)

    def keep(self, name: str, body: str) -> str:
        """Keep a definition under its revision, which it returns."""
        revision = _revision(body)
        if revision in self._kept:
            return revision
        self._kept.add(revision)
        now = self._transaction.now
        touched = self._connection.execute(
            update(schema.workflow_definitions).where(_D.revision == revision).values(used_at=now)
        ).rowcount
        if not touched:
            row = {"revision": revision, "name": name, "body": body, "used_at": now}
            self._connection.execute(insert(schema.workflow_definitions), [row])
        return revision


def _row(workflow: Workflow, now: float) -> Mapping[str, Any]:
    state = workflow.state
    return {
        "workflow_id": state.workflow_id,
        "key": state.key,
        "name": workflow.name,
        "revision": workflow.revision,
        "status": state.status.value,
        "priority": state.priority,
        "created_at": state.created_at,
        "updated_at": now,
        "finished_at": state.finished_at,
        "due_at": state.due_at,
        "state": encode(state),
    }


_bodies: dict[str, str] = {}
"""Definitions by revision: a revision names one body, for ever."""


def body_of(transaction: Transaction, revision: str) -> str:
    """The definition of a revision."""
    found = _bodies.get(revision)
    if found is None:
        if len(_bodies) > 256:
            _bodies.clear()
        wanted = select(_D.body).where(_D.revision == revision)
        found = _bodies[revision] = transaction.connection.execute(wanted).scalar_one()
    return found


@functools.lru_cache(maxsize=256)
def _revision(body: str) -> str:
    return Definition.model_validate_json(body).revision
