"""The door: requests become executions, once each; what can never be one is kept as a dead letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from pydantic_core import to_json
from sqlalchemy import insert, select

from jef_daemon import lifecycle, notifications
from jef_daemon.commits import Counted
from jef_daemon.ledger import control, rows, schema
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import FINAL, UNSTARTED, Execution, Status, waits_until
from jef_daemon.ports import Accepted, Arrival, Refusal

_HEADER_BYTES = 64 * 1024
"""Of a refused message's own headers; all headers go into one frame, of 128 KiB by default."""
_LARGEST_FLOAT = 3.4e38

_INSERT_EXECUTION = insert(schema.executions)
_INSERT_REQUEST = insert(schema.requests)


def accept(transaction: Transaction, arrivals: Sequence[Arrival | Refusal]) -> list[Accepted]:
    """Record requests and refusals; see `ports.Ledger.accept`."""
    known = transaction.known(_ids(arrivals))
    new: dict[str, Arrival] = {}
    returned: list[Execution] = []
    words = []
    for arrival in arrivals:
        if isinstance(arrival, Refusal):
            refuse(transaction, arrival, known.keys() | new.keys())
            words.append(Accepted.REFUSED)
            continue
        execution_id = arrival.execution.execution_id
        if execution_id in known:
            words.append(_again(transaction, arrival, known[execution_id]))
            if words[-1] is Accepted.TAKEN_AGAIN:
                returned.append(known[execution_id])
        elif execution_id in new:
            words.append(Accepted.KNOWN)
        else:
            new[execution_id] = arrival
            words.append(Accepted.NEW)
    here = returned + _record(transaction, list(new.values()))
    cancelled = (
        control.apply_tombstones(transaction, here) if here and control.has_tombstones(transaction) else set()
    )
    if cancelled:
        words = [
            Accepted.CANCELLED
            if isinstance(arrival, Arrival)
            and arrival.execution.execution_id in cancelled
            and word in {Accepted.NEW, Accepted.TAKEN_AGAIN}
            else word
            for arrival, word in zip(arrivals, words, strict=True)
        ]
    return words


def _record(transaction: Transaction, arrivals: list[Arrival]) -> list[Execution]:
    """Record new executions."""
    if not arrivals:
        return []
    moves = [lifecycle.accept(arrival.execution, transaction.now) for arrival in arrivals]
    transaction.driver.change(_INSERT_EXECUTION, *(rows.row_of(move.execution) for move in moves))
    bodies = ({"execution_id": each.execution.execution_id, "body": each.body} for each in arrivals)
    transaction.driver.change(_INSERT_REQUEST, *bodies)
    for move in moves:
        transaction.note(move)
    transaction.locks.enter((a.execution, a.locks) for a in arrivals if a.execution.wants_locks)
    return [move.execution for move in moves]


def _again(transaction: Transaction, arrival: Arrival, execution: Execution) -> Accepted:
    """A redelivery or a duplicate: nothing runs twice for it."""
    came = arrival.execution
    # Only what a daemon handed back counts so far. A copy of the request does not: the job is elsewhere by
    # now, or has ended there, and would run twice.
    if execution.handed_back and execution.status in UNSTARTED and came.sequence >= execution.sequence:
        execution.handed_back, execution.updated_at = False, transaction.now
        execution.sequence, execution.attempt, execution.token = came.sequence, came.attempt, came.token
        # As with any daemon that takes it: a retry's delay was not handed on, and its waits begin now.
        execution.not_before = came.not_before
        execution.due_at = waits_until(execution, max(transaction.now, came.not_before or transaction.now))
        transaction.update([execution])
        if execution.wants_locks:
            transaction.locks.come_back(execution)
        return Accepted.TAKEN_AGAIN
    if execution.status not in FINAL:
        return Accepted.KNOWN
    told = transaction.connection.scalar(
        select(schema.outcomes.c.notification).where(schema.outcomes.c.execution_id == execution.execution_id)
    )
    if told is not None:
        # The stored words go to whoever asks now; the sequence number tells others they saw them.
        transaction.tell(execution, told, arrival.execution.reply_to, arrival.execution.correlation_id)
    return Accepted.FINISHED


def refuse(transaction: Transaction, refusal: Refusal, known: AbstractSet[str]) -> None:
    """Keep a message as a dead letter; tell of its execution where it can be named and is none of `known`."""
    error, delivery = refusal.error, refusal.delivery
    transaction.count(Counted.MESSAGE_REFUSED, error.code)
    headers = _plain(delivery.headers) | {
        "x-jef-reason": error.code,
        "x-jef-detail": error.detail[:1000],
        "x-jef-routing-key": delivery.routing_key,
    }
    transaction.post(
        transaction.names.dead,
        delivery.routing_key,
        delivery.body,
        headers,
        delivery.correlation_id,
        delivery.reply_to,
    )
    if error.execution_id and error.execution_id not in known:
        body = notifications.refused_notification(refusal.action, error, transaction.now)
        transaction.post(
            transaction.names.status, notifications.routing_key(refusal.action, Status.FAILED), body
        )
        transaction.count(Counted.NOTIFIED, Status.FAILED.value)


def _ids(arrivals: Sequence[Arrival | Refusal]) -> set[str]:
    named = (
        arrival.error.execution_id if isinstance(arrival, Refusal) else arrival.execution.execution_id
        for arrival in arrivals
    )
    return {name for name in named if name}


def _plain(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Those headers that survive being kept as JSON and sent again, beside ours, in one frame."""
    kept: dict[str, Any] = {}
    room = _HEADER_BYTES
    for key, value in headers.items():
        size = len(key.encode()) + _size(value)
        if _is_plain(value) and size <= room:
            kept[key] = value
            room -= size
    return kept


def _size(value: object) -> int:
    try:
        return len(to_json(value))
    except ValueError:
        return _HEADER_BYTES + 1


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(_is_plain(each) for each in value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, float):  # sent in single precision
        return abs(value) <= _LARGEST_FLOAT
    return value is None or isinstance(value, str)
