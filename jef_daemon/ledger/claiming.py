"""From the queue to a slot: which executions start now, and how many wait."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import bindparam, func, literal, null, select

from jef_daemon import lifecycle
from jef_daemon.events import Started
from jef_daemon.ledger import rows, schema
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import UNSTARTED
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
    .where(
        _EX.status.in_([literal(status.value) for status in sorted(UNSTARTED)]), _EX.handed_back.is_(False)
    )
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
            candidates += map(_Candidate, transaction.driver.rows(_CLAIMABLE, found))
    # Granted ones first: others wait for the locks that they hold.
    candidates.sort(key=lambda each: (each.grants is None, -each.execution.priority, each.number))
    claimed = [_start(transaction, each) for each in _fitting(candidates, capacity)]
    if claimed:
        transaction.update(job.execution for job in claimed)
        transaction.locks.start([job.execution.execution_id for job in claimed if job.grants])
    return claimed


class _Candidate:
    """An execution that may start now."""

    __slots__ = ("body", "execution", "grants", "number")

    def __init__(self, row: Sequence[Any]) -> None:
        self.execution = rows.execution_of(row)
        self.body: str
        self.number: int
        self.grants: str | None
        self.body, self.number, self.grants = row[-3:]


def _granted(transaction: Transaction, capacity: Capacity) -> list[_Candidate]:
    """Jobs that have their locks and wait for a slot, of the actions that have one."""
    found: list[_Candidate] = []
    for (wanted,) in transaction.driver.rows(_GRANTED_ACTIONS, {}):
        if places := capacity.by_action.get(wanted, 0):
            terms = {"wanted": wanted, "most": min(places, capacity.total), "now": transaction.now}
            found += map(_Candidate, transaction.driver.rows(_GRANTED, terms))
    return found


def _start(transaction: Transaction, found: _Candidate) -> Claimed:
    move = lifecycle.apply(found.execution, Started(), transaction.now)
    transaction.note(move)
    granted = json.loads(found.grants) if found.grants else []
    return Claimed(
        move.execution, found.body, tuple((resource, mode, number) for resource, mode, number in granted)
    )


def queued(transaction: Transaction) -> dict[str, int]:
    """The backlog: queued executions of each action that wait for a slot only."""
    return {row[0]: row[1] for row in transaction.connection.execute(_BACKLOG)}


def waiting_for_locks(transaction: Transaction) -> int:
    """How many executions wait for a lock."""
    waiting = select(func.count()).where(_EX.status == "WAITING_FOR_LOCK", _EX.handed_back.is_(False))
    return transaction.connection.scalar(waiting) or 0


def _fitting(candidates: list[_Candidate], capacity: Capacity) -> Iterable[_Candidate]:
    """Those candidates, best first, that together fit slots, places of their action and processes."""
    slots, processes = capacity.total, capacity.processes
    places = dict(capacity.by_action)  # an action's granted jobs and its queued ones share them
    for each in candidates:
        action = each.execution.action
        is_blocking = action in capacity.blocking
        if slots <= 0:
            return
        if places[action] <= 0 or (is_blocking and processes <= 0):
            continue
        slots -= 1
        places[action] -= 1
        processes -= is_blocking
        yield each
