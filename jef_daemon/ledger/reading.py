"""Looking into a ledger without disturbing it: one execution, many, a history. For people and programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import DBAPIError

from jef_daemon.errors import LedgerUnavailable, NotFound
from jef_daemon.ledger import rows, schema
from jef_daemon.ledger.opening import existing, explain, open_engine, version
from jef_daemon.lifecycle import UNSTARTED, Execution, Status
from jef_daemon.messages import timestamp

_EX = schema.executions.c


@dataclass(frozen=True, slots=True)
class Filter:
    """Which executions; an empty field does not filter."""

    statuses: Sequence[Status] = ()
    action: str | None = None
    workflow_id: str | None = None
    since: float | None = None
    """Queued at this instant or later, UTC seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Page:
    """Executions, newest first, and where the next page begins (None: this was the last)."""

    executions: list[Execution]
    next_before: int | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a history."""

    at: float
    attempt: int
    sequence: int
    before: str
    status: str
    event: str
    actor: str
    reason: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobLock:
    """What a job asked of the lock service, and what became of it."""

    state: str
    """See `ledger.job_locks`."""
    at: float
    """Its meaning depends on the state."""
    wanted: list[dict[str, Any]]
    """`resource` and `mode`; while they are granted or held, `fencingToken` too."""
    waiting_for: dict[str, Any] | None
    """What was last told of the queue, while it waits."""


@dataclass(frozen=True, slots=True)
class LockEntry:
    """One line of a resource's history."""

    at: float
    resource: str
    owner: str
    event: str
    """asked, granted, ended, left"""
    mode: str
    fencing_token: int | None
    reason: str


class Reader:
    """Reads a ledger, also while a daemon writes it.

    Raises:
        LedgerUnavailable: there is none, or it cannot be read.
    """

    def __init__(self, ledger_url: str) -> None:
        self._engine: Engine = open_engine(existing(ledger_url), read_only=True)
        database = self._engine.url.database
        try:
            if version(self._engine) is None:
                raise LedgerUnavailable(f"{database} is empty; start a daemon on it first")
        except DBAPIError as error:
            raise LedgerUnavailable(explain(error, self._engine.url)) from None

    def find(self, identifier: str) -> Execution:
        """The execution with this id, or the newest whose executor calls it so elsewhere.

        Raises:
            NotFound: neither is known.
        """
        with self._engine.connect() as connection:
            for column in (_EX.execution_id, _EX.external_id):
                row = connection.execute(
                    select(*rows.COLUMNS).where(column == identifier).order_by(_EX.number.desc()).limit(1)
                ).first()
                if row is not None:
                    return rows.execution_of(row)
        raise NotFound(f"no execution {identifier} is in this ledger; `jef list` shows which are")

    def page(self, wanted: Filter, most: int = 50, before: int | None = None) -> Page:
        """A page of executions, newest first.

        Args:
            wanted: which.
            most: how many, at least 1.
            before: the previous page's `next_before`.
        """
        query = select(*rows.COLUMNS, _EX.number).order_by(_EX.number.desc()).limit(most + 1)
        if wanted.statuses:
            query = query.where(_EX.status.in_([status.value for status in wanted.statuses]))
        if wanted.action:
            query = query.where(_EX.action == wanted.action)
        if wanted.workflow_id:
            query = query.where(_EX.workflow_id == wanted.workflow_id)
        if wanted.since is not None:
            query = query.where(_EX.queued_at >= wanted.since)
        if before is not None:
            query = query.where(_EX.number < before)
        with self._engine.connect() as connection:
            found = connection.execute(query).all()
        page = found[:most]
        return Page([rows.execution_of(row) for row in page], page[-1].number if len(found) > most else None)

    def count(self) -> dict[str, int]:
        """Executions by status."""
        with self._engine.connect() as connection:
            found = connection.execute(select(_EX.status, func.count()).group_by(_EX.status))
            return {row[0]: row[1] for row in found}

    def history(self, execution_id: str) -> list[Entry]:
        """What happened to an execution, in order."""
        table = schema.history.c
        wanted = select(schema.history).where(table.execution_id == execution_id).order_by(table.number)
        with self._engine.connect() as connection:
            return [_entry(row) for row in connection.execute(wanted)]

    def locks(self, execution_id: str) -> JobLock | None:
        """How a job stands with the lock service; None: it wants no locks."""
        table = schema.job_locks
        with self._engine.connect() as connection:
            row = connection.execute(select(table).where(table.c.execution_id == execution_id)).first()
        return None if row is None else _job_lock(row)

    def lock_history(self, resource: str, most: int = 100) -> list[LockEntry]:
        """What happened to a resource, in order, where this ledger is the lock service's.

        Args:
            resource: its name.
            most: how many of the newest lines, at least 1.
        """
        table = schema.lock_history.c
        names = ("at", "resource", "owner", "event", "mode", "fencing_token", "reason")
        newest = (
            select(*(table[name] for name in names))
            .where(table.resource == resource)
            .order_by(table.number.desc())
            .limit(most)
        )
        with self._engine.connect() as connection:
            return [LockEntry(*row) for row in connection.execute(newest)][::-1]

    def request(self, execution_id: str) -> dict[str, Any]:
        """The request as it came, unknown keys included."""
        return self._document(schema.requests.c.body, execution_id)

    def outcome(self, execution_id: str) -> dict[str, Any]:
        """The final notification; empty while there is none."""
        return self._document(schema.outcomes.c.notification, execution_id)

    def checkpoint(self, execution_id: str) -> Any:
        """What its executor saved last; None: nothing."""
        wanted = schema.checkpoints.c
        with self._engine.connect() as connection:
            found = connection.scalar(select(wanted.data).where(wanted.execution_id == execution_id))
        return None if found is None else json.loads(found)

    def document(self, identifier: str) -> dict[str, Any]:
        """All about an execution, as JSON has it: its summary, locks if it wants any, checkpoint, request, outcome.

        Raises:
            NotFound: see `find`.
        """
        execution = self.find(identifier)
        name = execution.execution_id
        told = summary(execution)
        if (lock := self.locks(name)) is not None:
            told["locks"] = {"state": lock.state, "wanted": lock.wanted, "waitingFor": lock.waiting_for}
        return told | {
            "checkpoint": self.checkpoint(name),
            "request": self.request(name),
            "outcome": self.outcome(name) or None,
        }

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()

    def _document(self, column: Any, execution_id: str) -> dict[str, Any]:
        with self._engine.connect() as connection:
            found = connection.scalar(select(column).where(column.table.c.execution_id == execution_id))
        document: dict[str, Any] = json.loads(found) if found is not None else {}
        return document


def _job_lock(row: Any) -> JobLock:
    numbers = {resource: number for resource, _, number in json.loads(row.grants or "[]")}
    wanted: list[dict[str, Any]] = []
    for resource, mode in json.loads(row.locks):
        number = {"fencingToken": numbers[resource]} if resource in numbers else {}
        wanted.append({"resource": resource, "mode": mode, **number})
    waits = row.state == "waiting" and row.place
    return JobLock(row.state, row.at, wanted, json.loads(row.place) if waits else None)


def summary(execution: Execution) -> dict[str, Any]:
    """An execution as JSON has it; times are RFC 3339 in UTC."""
    return {
        "executionId": execution.execution_id,
        "externalId": execution.external_id,
        "workflowId": execution.workflow_id,
        "stage": execution.stage,
        "action": execution.action,
        "status": execution.status.value,
        "progress": execution.progress,
        "message": execution.message,
        "attempt": execution.attempt,
        "maxAttempts": execution.max_attempts,
        "cancelRequested": execution.cancel_requested,
        "sequence": execution.sequence,
        "priority": execution.priority,
        "handedBack": execution.handed_back,
        "queuedAt": _told(execution.queued_at),
        "notBefore": _told(execution.not_before) if _is_to_come(execution) else None,
        "startedAt": _told(execution.started_at),
        "finishedAt": _told(execution.finished_at),
    }


def _is_to_come(execution: Execution) -> bool:
    """Whether `not_before` still means something: the start, or the next attempt."""
    return execution.not_before is not None and execution.status in UNSTARTED


def _told(instant: float | None) -> str | None:
    return None if instant is None else timestamp(instant)


def _entry(row: Any) -> Entry:
    return Entry(
        row.at,
        row.attempt,
        row.sequence,
        row.before,
        row.status,
        row.event,
        row.actor,
        row.reason,
        json.loads(row.detail) if row.detail else {},
    )
