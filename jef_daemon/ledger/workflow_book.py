"""The workflows that one transaction changes: each is read once, written once; their history; their definitions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import bindparam, insert, select, update

from jef_daemon.ledger import schema
from jef_daemon.ledger.driver import ByKey
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.workflow import events, messages
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.plan import Plan, plan_of
from jef_daemon.workflow.state import State, decode, encode

log = structlog.get_logger()

_W, _D = schema.workflows.c, schema.workflow_definitions.c
_CHANGING = ("status", "updated_at", "finished_at", "due_at", "state")
_BY_KEY = ByKey((_W.key, _W.name, _W.revision, _W.state, _W.due_at), _W.key, (1, 20, 200))
_INSERT = insert(schema.workflows)
_UPDATE = (
    update(schema.workflows)
    .where(_W.key == bindparam("which"))
    .values({name: bindparam(f"new_{name}") for name in _CHANGING})
)
_INSERT_HISTORY = insert(schema.workflow_history)


@dataclass(slots=True)
class Workflow:
    """One that is being changed."""

    is_new: bool
    """Whether the ledger does not have it yet."""
    name: str
    revision: str
    plan: Plan
    state: State
    kept: str = ""
    """The state as it was before the last event, encoded."""


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

    def remember(self, workflow: Workflow) -> None:
        """Have a state to go back to."""
        if workflow.state.key in self._changed:  # else it is as it was read or written
            workflow.kept = encode(workflow.state)

    def read(self, keys: Iterable[str]) -> None:
        """Read workflows that were not read yet; those that are not there stay away."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self.open]
        for key, name, revision, kept, due_at in _BY_KEY.find(self._transaction.driver, wanted):
            state = decode(kept)
            state.due_at = due_at  # it is moved when the wall clock is set
            plan = plan_of(body_of(self._transaction, revision))
            self.open[key] = Workflow(False, name, revision, plan, state, kept)

    def find(self, key: str) -> Workflow | None:
        """One that nothing concerns that came: where it cannot be read, what came is not to fail for it."""
        try:
            self.read([key])
        except ValueError as error:
            tell_unreadable(key, error)
        return self.open.get(key)

    def write(self) -> None:
        """Write what has changed."""
        changed, self._changed = self._changed, {}
        new = [each for each in changed.values() if each.is_new]
        old = [each for each in changed.values() if not each.is_new]
        driver, now = self._transaction.driver, self._transaction.now
        for each in changed.values():
            each.kept = encode(each.state)
        if old:
            driver.change(_UPDATE, *(_changes(each, now) for each in old))
        if new:
            driver.change(_INSERT, *(_row(each, now) for each in new))
        for each in new:
            each.is_new = False

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


def _changes(workflow: Workflow, now: float) -> Mapping[str, Any]:
    state = workflow.state
    return {
        "which": state.key,
        "new_status": state.status.value,
        "new_updated_at": now,
        "new_finished_at": state.finished_at,
        "new_due_at": state.due_at,
        "new_state": workflow.kept,
    }


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
        "state": workflow.kept,
    }


_told_unreadable: set[str] = set()


def tell_unreadable(what: str, error: ValueError) -> None:
    """Say that something in the ledger cannot be read: once in a daemon's life, however often it is looked at."""
    if what not in _told_unreadable:
        _told_unreadable.add(what)
        log.error("workflow_unreadable", which=what, error=str(error), consequence="it is left as it is")


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
