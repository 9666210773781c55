"""From the queue to a slot: which executions start now, and how many wait."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import bindparam, func, null, select

from jef_daemon import lifecycle
from jef_daemon.ledger import rows, schema
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import UNSTARTED, Started
from jef_daemon.ports import Capacity, Claimed

_EX, _JL = schema.executions.c, schema.job_locks.c
_READY = (_EX.status == "QUEUED") & _EX.handed_back.is_(False) & _EX.wants_locks.is_(False)
_IS_DUE = _EX.not_before.is_(None) | (_EX.not_before <= bindparam("now"))
_CLAIMABLE = (
    select(*rows.COLUMNS, schema.requests.c.body, _EX.number, null().label("grants"))
    .join(schema.requests, schema.requests.c.execution_id == _EX.execution_id)
    .where(_READY, _EX.action == bindparam("wanted"), _IS_DUE)
    .order_by(_EX.priority.desc(), _EX.number)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True, of=schema.executions)
)
_GRANTED_ACTIONS = select(_JL.action).where(_JL.state == "granted").distinct()
_GRANTED = (
    select(*rows.COLUMNS, schema.requests.c.body, _EX.number, _JL.grants)
    .join_from(schema.job_locks, schema.executions, _JL.execution_id == _EX.execution_id)
    .join(schema.requests, schema.requests.c.execution_id == _EX.execution_id)
    .where(_JL.state == "granted", _JL.action == bindparam("wanted"), _JL.at > bindparam("now"))
    .where(_EX.status.in_([status.value for status in UNSTARTED]), _EX.handed_back.is_(False))
    .order_by(_EX.priority.desc(), _EX.number)
    .limit(bindparam("most"))
)
_BACKLOG = select(_EX.action, func.count()).where(_READY, _EX.not_before.is_(None)).group_by(_EX.action)


def claim(transaction: Transaction, capacity: Capacity) -> list[Claimed]:
    """Move queued executions to RUNNING; see `ports.Ledger.claim`."""
    candidates = _granted(transaction, capacity)
    for wanted, places in capacity.by_action.items():
        most = min(places, capacity.total)
        if wanted in capacity.blocking:
            most = min(most, capacity.processes)
        if most > 0:
            found = {"wanted": wanted, "most": most, "now": transaction.now}
            candidates += transaction.connection.execute(_CLAIMABLE, found).all()
    # Granted ones first: others wait for the locks that they hold.
    candidates.sort(key=lambda row: (row.grants is None, -row.priority, row.number))
    claimed = [_start(transaction, row) for row in _fitting(candidates, capacity)]
    if claimed:
        transaction.update(job.execution for job in claimed)
        transaction.locks.start([job.execution.execution_id for job in claimed if job.grants])
    return claimed


def _granted(transaction: Transaction, capacity: Capacity) -> list[Any]:
    """Jobs that have their locks and wait for a slot, of the actions that have one."""
    actions = transaction.connection.scalars(_GRANTED_ACTIONS).all()
    found: list[Any] = []
    for wanted in actions:
        if places := capacity.by_action.get(wanted, 0):
            terms = {"wanted": wanted, "most": min(places, capacity.total), "now": transaction.now}
            found += transaction.connection.execute(_GRANTED, terms).all()
    return found


def _start(transaction: Transaction, row: Any) -> Claimed:
    move = lifecycle.apply(rows.execution_of(row), Started(), transaction.now)
    transaction.note(move)
    grants = tuple((resource, mode, number) for resource, mode, number in json.loads(row.grants or "[]"))
    return Claimed(move.execution, row.body, grants)


def queued(transaction: Transaction) -> dict[str, int]:
    """The backlog: queued executions of each action that wait for a slot only."""
    return {row[0]: row[1] for row in transaction.connection.execute(_BACKLOG)}


def waiting_for_locks(transaction: Transaction) -> int:
    """How many executions wait for a lock."""
    waiting = select(func.count()).where(_EX.status == "WAITING_FOR_LOCK", _EX.handed_back.is_(False))
    return transaction.connection.scalar(waiting) or 0


def _fitting(candidates: list[Any], capacity: Capacity) -> Iterable[Any]:
    """Those candidates, best first, that together fit slots, places of their action and processes."""
    slots, processes = capacity.total, capacity.processes
    places = dict(capacity.by_action)  # an action's granted jobs and its queued ones share them
    for row in candidates:
        is_blocking = row.action in capacity.blocking
        if slots <= 0:
            return
        if places[row.action] <= 0 or (is_blocking and processes <= 0):
            continue
        slots -= 1
        places[row.action] -= 1
        processes -= is_blocking
        yield row
