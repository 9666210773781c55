"""Start and end of a daemon, and keeping house: steps that are repeated until nothing is left to do.

Each takes a `Transaction`, does a bounded piece of its work and says how much; the caller commits and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from sqlalchemy import ColumnElement, delete, select

from jef_daemon.events import Event, Failed, Interrupted
from jef_daemon.ledger import rows, schema
from jef_daemon.ledger.lock_store import purge_history
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import FINAL, UNSTARTED, Execution, Status
from jef_daemon.tokens import new_token
from jef_daemon.workflow.state import lock_owner

_EX = schema.executions.c
_STEP = 500
_UNSTARTED = [status.value for status in UNSTARTED]

MayRunAgain = Callable[[str], bool]
"""Whether an interrupted attempt of an action may simply be run again."""


def interrupt(transaction: Transaction, may_run_again: MayRunAgain, why: str, most: int = _STEP) -> int:
    """Settle executions that ran here when their daemon went; work outside goes on. Call until 0."""
    found = transaction.connection.execute(
        select(*rows.COLUMNS)
        .where(_EX.status == "RUNNING", _EX.outside.is_(False))
        .order_by(_EX.number)
        .limit(most)
    )
    moved = []
    for execution in map(rows.execution_of, found.all()):
        event = _interruption(execution, may_run_again, why)
        if (move := transaction.move(execution, None, event).transition) is not None:
            moved.append(move.execution)
    if moved:
        transaction.update(moved)
    return len(moved)


def hand_back(transaction: Transaction, actions: Collection[str] | None = None, most: int = _STEP) -> int:
    """Give unstarted jobs (of some actions; None: all) back to RabbitMQ, in order. Returns how many; call until 0."""
    wanted = (
        select(*rows.COLUMNS, schema.requests.c.body)
        .join(schema.requests, schema.requests.c.execution_id == _EX.execution_id)
        .where(_EX.status.in_(_UNSTARTED), _EX.handed_back.is_(False))
        .order_by(_EX.priority.desc(), _EX.number)
        .limit(most)
    )
    if actions is not None:
        wanted = wanted.where(_EX.action.in_(list(actions)))
    found = transaction.connection.execute(wanted).all()
    given = []
    for row in found:
        execution = rows.execution_of(row)
        execution.handed_back, execution.updated_at = True, transaction.now
        given.append((execution, row.body))
    if given:
        transaction.update(execution for execution, _ in given)
        # A new attempt of just now asks; were it to ask behind this, a job that is gone would get its locks.
        transaction.follow_locks()
        # Before the jobs themselves: whoever takes them asks for the same locks.
        transaction.locks.let_go([execution.execution_id for execution, _ in given if execution.wants_locks])
    for execution, body in given:
        _return(transaction, execution, body)
    return len(given)


def purge(transaction: Transaction, before: float, most: int) -> int:
    """Delete executions that finished (or were handed back) before an instant. Returns how many."""
    given_back = _EX.handed_back.is_(True) & _EX.status.in_(_UNSTARTED)
    old = finished_before(before) | (given_back & (_EX.updated_at < before))
    ids = transaction.connection.scalars(select(_EX.execution_id).where(old).limit(most)).all()
    tables = (
        *(schema.requests, schema.outcomes, schema.history, schema.job_locks),
        *(schema.checkpoints, schema.calls, schema.executions),
    )
    for table in tables:
        if ids:
            transaction.connection.execute(delete(table).where(table.c.execution_id.in_(ids)))
    return len(ids)


def finished_before(before: float) -> ColumnElement[bool]:
    """Which executions are over since then; one that is TIMED_OUT is not as long as a late update may come."""
    is_over = (_EX.status != Status.TIMED_OUT.value) | _EX.fenced
    return _EX.status.in_([status.value for status in FINAL]) & is_over & (_EX.finished_at < before)


def purge_locks(transaction: Transaction, before: float, most: int) -> int:
    """Delete the locks' history of before an instant. Returns how many lines."""
    return purge_history(transaction.connection, before, most)


def purge_workflows(transaction: Transaction, before: float, most: int) -> int:
    """Delete workflows that finished before an instant, and definitions that none is pinned to. Returns how many."""
    old = select(schema.workflows.c.workflow_id).where(schema.workflows.c.finished_at < before).limit(most)
    names = transaction.connection.scalars(old).all()
    if names:
        transaction.connection.execute(
            delete(schema.workflow_history).where(schema.workflow_history.c.workflow_id.in_(names))
        )
        transaction.connection.execute(
            delete(schema.workflows).where(schema.workflows.c.workflow_id.in_(names))
        )
        owners = [lock_owner(name) for name in names]
        transaction.connection.execute(
            delete(schema.job_locks).where(schema.job_locks.c.execution_id.in_(owners))
        )
    _purge_definitions(transaction, before)
    return len(names)


def _purge_definitions(transaction: Transaction, before: float) -> None:
    """Delete definitions that no workflow is pinned to.

    What a workflow is pinned to, for itself and for those within it that have not begun yet, was used when it began: so
    the oldest that there is tells which definitions none needs, without a look at the others.
    """
    columns = schema.workflows.c
    oldest = transaction.connection.scalar(select(columns.created_at).order_by(columns.number).limit(1))
    unused = before if oldest is None else min(before, oldest)
    transaction.connection.execute(
        delete(schema.workflow_definitions).where(schema.workflow_definitions.c.used_at < unused)
    )


def _return(transaction: Transaction, execution: Execution, body: str) -> None:
    # Whoever takes it goes on counting where we stop, so that its notifications are not taken for old ones.
    headers = {"x-jef-sequence": execution.sequence, "x-jef-attempt": execution.attempt}
    if execution.traceparent:
        headers["traceparent"] = execution.traceparent  # type: ignore[assignment]
    transaction.post(
        transaction.names.jobs,
        execution.action,
        body.encode(),
        headers,
        execution.correlation_id,
        execution.reply_to,
    )


def _interruption(execution: Execution, may_run_again: MayRunAgain, why: str) -> Event:
    if may_run_again(execution.action):
        return Interrupted(token=new_token(), reason=why)
    return Failed(actor="daemon", error_type="Interrupted", error_message=why)
