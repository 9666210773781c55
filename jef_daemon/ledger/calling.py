"""Calls of async executors inside a transaction: which are due, what came of them; and checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, update

from jef_daemon.commits import Counted
from jef_daemon.events import Event, Failed
from jef_daemon.ledger import rows, schema
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import WORKING, Execution
from jef_daemon.ports import NOTHING_TO_POLL, Call, Consequences

_EX, _CALLS, _CHECKPOINTS = schema.executions.c, schema.calls.c, schema.checkpoints.c
_DUE = (
    select(
        *(*rows.COLUMNS, schema.requests.c.body, _CALLS.call, _CALLS.number),
        *(_CALLS.attempt.label("of_attempt"), _CALLS.external_id.label("of_external_id")),
    )
    .join_from(schema.calls, schema.executions, _CALLS.execution_id == _EX.execution_id)
    .join(schema.requests, schema.requests.c.execution_id == _EX.execution_id)
    .where(_CALLS.at <= bindparam("now"))
    .order_by(_CALLS.at)
    .limit(bindparam("most"))
)
_THIS = (_CALLS.execution_id == bindparam("key")) & (_CALLS.call == bindparam("which"))
_PUT_OFF = update(schema.calls).where(_THIS).values(at=bindparam("new_at"), number=bindparam("new_number"))
_DONE = delete(schema.calls).where(
    _THIS, _CALLS.attempt.is_(None) | (_CALLS.attempt == bindparam("of_attempt"))
)
"""Not one that took its place meanwhile, for another attempt."""
_INTERVAL_FIRST_S, _INTERVAL_GROWTH, _INTERVAL_MOST_S = 1.0, 1.5, 60.0
AGAIN_S = 120.0
"""A call whose answer never came, as its daemon died, is made again then. No call is due later than that."""


def due(transaction: Transaction, most: int) -> list[Call]:
    """Take calls that are due."""
    found = transaction.connection.execute(_DUE, {"now": transaction.now, "most": most}).all()
    calls = [Call(row.call, _meant(row), row.body, row.number) for row in found]
    if calls:
        transaction.connection.execute(
            _PUT_OFF, [_new(call, transaction.now + AGAIN_S, call.number + 1) for call in calls]
        )
    return calls


def _meant(row: Any) -> Execution:
    """The execution as it is, or as it was in the attempt that is meant."""
    execution = rows.execution_of(row)
    if row.of_attempt is None:
        return execution
    return dataclasses.replace(execution, attempt=row.of_attempt, external_id=row.of_external_id)


def answer(transaction: Transaction, call: Call, event: Event | None) -> Consequences:
    """Record what came of a call; one for an attempt that is over means nothing."""
    found = Consequences()
    name = call.execution.execution_id
    done = {"key": name, "which": call.name, "of_attempt": call.execution.attempt}
    if call.name != "poll":
        transaction.connection.execute(_DONE, done)
    current = transaction.known([name]).get(name)
    if current is None or current.attempt != call.execution.attempt or current.place not in WORKING:
        if call.name == "poll" and event is not None and not _says_nothing(event):
            transaction.count(Counted.FENCED, "call")
        return found
    if event is not None and _says_nothing(event):
        transaction.connection.execute(_DONE, done)
        return found
    if isinstance(event, Failed) and call.name != "poll":
        # The hook failed, not the job.
        entry = rows.command_entry(
            current, f"{call.name} failed", "executor", event.error_message, transaction.now
        )
        transaction.remember(entry)
        event = None
    if event is not None:
        applied = transaction.move(current, current.attempt, event)
        if applied.transition is not None:
            moved = applied.transition.execution
            transaction.update([moved])
            if moved.attempt != current.attempt and moved.is_backlog:
                found.queued.append(moved.action)
    if call.name == "poll" and event is None:
        interval = min(_INTERVAL_MOST_S, _INTERVAL_FIRST_S * _INTERVAL_GROWTH ** min(call.number + 1, 64))
        transaction.connection.execute(_PUT_OFF, _new(call, transaction.now + interval, call.number + 1))
    return found


def _says_nothing(event: Event) -> bool:
    return isinstance(event, Failed) and event.error_type == NOTHING_TO_POLL


def save(transaction: Transaction, execution_id: str, attempt: int, checkpoint: str) -> bool:
    """Keep a checkpoint; False where the attempt does not run any more."""
    execution = transaction.known([execution_id]).get(execution_id)
    if execution is None or execution.attempt != attempt or execution.place not in WORKING:
        transaction.count(Counted.FENCED, "checkpoint")
        return False
    transaction.connection.execute(
        delete(schema.checkpoints).where(_CHECKPOINTS.execution_id == execution_id)
    )
    transaction.connection.execute(
        insert(schema.checkpoints), {"execution_id": execution_id, "data": checkpoint}
    )
    return True


def saved(transaction: Transaction, execution_id: str) -> str | None:
    """The last checkpoint of an execution, as JSON."""
    found: str | None = transaction.connection.scalar(
        select(_CHECKPOINTS.data).where(_CHECKPOINTS.execution_id == execution_id)
    )
    return found


def _new(call: Call, at: float, number: int) -> dict[str, object]:
    return {"key": call.execution.execution_id, "which": call.name, "new_at": at, "new_number": number}
