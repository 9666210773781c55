"""Between rows and values: executions, history entries, outbox messages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from pydantic_core import to_json

from jef_daemon.events import Completed, Event, Failed, LockAwaited, Progressed
from jef_daemon.ledger import schema
from jef_daemon.lifecycle import Execution, Place, Status, Transition
from jef_daemon.ports import Outgoing

FIELDS = tuple(field.name for field in dataclasses.fields(Execution))
COLUMNS = tuple(schema.executions.c[name] for name in FIELDS)
_STATUS_AT = FIELDS.index("status")
_FLAGS_AT = tuple(at for at, field in enumerate(dataclasses.fields(Execution)) if field.type == "bool")

FIXED = frozenset(
    {"execution_id", "action", "workflow_id", "priority", "traceparent", "reply_to", "correlation_id"}
    | {"wants_locks", "update_timeout_s", "execution_timeout_s", "max_attempts", "timeout_grace_s"}
    | {"queue_timeout_s", "lock_timeout_s", "stage"}
)
"""Fields that the request sets once and no event changes."""
_CHANGING = tuple(name for name in FIELDS if name not in FIXED)
_ALL, _CHANGES = attrgetter(*FIELDS), attrgetter(*_CHANGING)

Row = dict[str, Any]


def execution_of(row: Sequence[Any]) -> Execution:
    """The execution whose `COLUMNS` a row begins with."""
    values = list(row[: len(FIELDS)])
    values[_STATUS_AT] = Status(values[_STATUS_AT])
    for at in _FLAGS_AT:  # a driver of its own accord may know them as numbers
        values[at] = bool(values[at])
    return Execution(*values)


def row_of(execution: Execution) -> Row:
    """The columns of a new execution."""
    return dict(zip(FIELDS, _ALL(execution), strict=True)) | {"status": execution.status.value}


def changes_of(execution: Execution) -> Row:
    """The columns that events change, keyed as `update` statements here bind them."""
    changed = dict(zip(_CHANGING, _CHANGES(execution), strict=True))
    return changed | {"key": execution.execution_id, "status": execution.status.value}


def entry_of(transition: Transition) -> Row | None:
    """The history entry of a transition; progress, and moving up in a queue, are no history."""
    event = transition.event
    if isinstance(event, Progressed) and not transition.late:
        return None
    if isinstance(event, LockAwaited) and transition.before is Place.WAITING_FOR_LOCK and not event.reason:
        return None
    execution = transition.execution
    return {
        "execution_id": execution.execution_id,
        "at": transition.at,
        "attempt": execution.attempt,
        "sequence": execution.sequence,
        "before": transition.before.value,
        "status": execution.status.value,
        "event": type(event).__name__,
        "actor": event.actor,
        "reason": event.reason,
        "detail": _detail(event),
    }


REFUSED = " refused"
"""What the name of an event ends with that changed nothing."""


def refusal_entry(execution: Execution, event: Event, why: str, at: float) -> Row:
    """The history entry of an event that the life cycle did not allow."""
    return {
        "execution_id": execution.execution_id,
        "at": at,
        "attempt": execution.attempt,
        "sequence": execution.sequence,
        "before": execution.place.value,
        "status": execution.status.value,
        "event": f"{type(event).__name__}{REFUSED}",
        "actor": event.actor,
        "reason": why,
        "detail": _detail(event),
    }


def lock_entry(execution: Execution, event: str, reason: str, at: float, detail: dict[str, Any]) -> Row:
    """The history entry of something that happened to a job's locks; its status stays."""
    return command_entry(execution, event, "locks", reason, at, detail)


def command_entry(
    execution: Execution,
    event: str,
    actor: str,
    reason: str,
    at: float,
    detail: dict[str, Any] | None = None,
) -> Row:
    """The history entry of something that happened to an execution without moving it."""
    return {
        "execution_id": execution.execution_id,
        "at": at,
        "attempt": execution.attempt,
        "sequence": execution.sequence,
        "before": execution.place.value,
        "status": execution.status.value,
        "event": event,
        "actor": actor,
        "reason": reason,
        "detail": _json(detail) if detail else None,
    }


def outgoing_of(row: Any) -> Outgoing:
    """A message of the outbox."""
    headers = json.loads(row.headers) if row.headers else None
    return Outgoing(
        row.id, row.exchange, row.routing_key, row.body, headers, row.correlation_id, row.reply_to
    )


def outbox_row(message: Outgoing, at: float) -> Row:
    """The row of a message that is put in at an instant."""
    return {
        "id": message.id,
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "body": message.body,
        "headers": json.dumps(message.headers) if message.headers else None,
        "correlation_id": message.correlation_id,
        "reply_to": message.reply_to,
        "at": at,
    }


def _detail(event: Event) -> str | None:
    if isinstance(event, Failed):
        error = {"type": event.error_type, "message": event.error_message, "traceback": event.traceback}
        return _json({"error": error})
    if isinstance(event, Completed) and event.result:
        return _json({"result": event.result})
    if isinstance(event, LockAwaited):
        return _json({"waitingFor": dict(event.waiting_for)})
    return None


def _json(value: dict[str, Any]) -> str:
    return to_json(value).decode()
