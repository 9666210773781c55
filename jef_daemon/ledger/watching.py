"""Clocks inside a transaction: who fell silent, who waited or ran too long, whose time of grace is over.

The watcher says when to look; what is true is decided here, of what the ledger says then. So an update that was
persisted before is seen, one that comes behind finds the time-out, and nothing is told that did not happen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, or_, select, update

from jef_daemon.events import Event, Failed, FellSilent, GraceEnded, Started
from jef_daemon.ledger import rows as tables
from jef_daemon.ledger import schema
from jef_daemon.ledger.calling import AGAIN_S
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import UNSTARTED, Execution, Place
from jef_daemon.ports import Consequences, Silence, Stop

_EX = schema.executions.c
_UNSTARTED = [status.value for status in UNSTARTED]
_ACTOR = "watcher"
_JUST_NOW_S = 2.5
"""A clock that was set is noticed sooner than that: what was written since then has the new time."""

_WATCHED = (
    select(_EX.execution_id, _EX.update_deadline)
    .where(_EX.update_deadline.is_not(None))
    .where(
        or_(
            _EX.update_deadline > bindparam("after"),
            and_(_EX.update_deadline == bindparam("after"), _EX.execution_id > bindparam("after_id")),
        )
    )
    .order_by(_EX.update_deadline, _EX.execution_id)
    .limit(bindparam("most"))
)
_OVERDUE = (
    select(_EX.execution_id)
    .where(_EX.update_deadline.is_not(None), _EX.update_deadline <= bindparam("until"))
    .order_by(_EX.update_deadline)
    .limit(bindparam("most"))
)
_DUE = (
    select(*tables.COLUMNS)
    .where(_EX.due_at.is_not(None), _EX.handed_back.is_(False), _EX.due_at <= bindparam("until"))
    .order_by(_EX.due_at)
    .limit(bindparam("most"))
)


# --- silence ---------------------------------------------------------------------------------------------


def watched(transaction: Transaction, after: tuple[float, str], most: int) -> list[tuple[str, float]]:
    """A page of those that may fall silent with their deadlines, by deadline, then id, behind `after`."""
    found = transaction.connection.execute(_WATCHED, {"after": after[0], "after_id": after[1], "most": most})
    return [(row.execution_id, row.update_deadline) for row in found]


def overdue(transaction: Transaction, until: float, most: int) -> list[str]:
    """Those whose deadline has passed."""
    return list(transaction.connection.scalars(_OVERDUE, {"until": until, "most": most}))


def fall_silent(transaction: Transaction, ids: Sequence[str], now: float) -> Silence:
    """Flag those of some executions that are RUNNING and past their deadline.

    Args:
        transaction: to be committed by the caller.
        ids: who seems silent.
        now: the watcher's wall clock: one that was set since then does not count.
    """
    silence = Silence()
    flagged = []
    for execution in transaction.known(ids).values():
        deadline = execution.update_deadline
        if deadline is None:  # it does not run, or may be silent
            continue
        if deadline > now:
            silence.later[execution.execution_id] = deadline
            continue
        move = transaction.move(execution, None, FellSilent(reason=_silent_for(execution, deadline, now)))
        if move.transition is not None:
            flagged.append(move.transition.execution)
            silence.lateness_s.append(now - deadline)
    if flagged:
        transaction.update(flagged)
    return silence


def _silent_for(execution: Execution, deadline: float, now: float) -> str:
    allowed = execution.update_timeout_s or 0
    return f"no update for {now - deadline + allowed:.1f} s; {allowed:g} s are allowed"


# --- the other clocks ------------------------------------------------------------------------------------


def run_out(transaction: Transaction, now: float, most: int) -> Consequences:
    """End what waited or ran too long, and times of grace that are over. Repeat while there is more (`again`).

    Args:
        transaction: to be committed by the caller.
        now: the watcher's wall clock.
        most: how many at once.
    """
    found = Consequences()
    due = [
        tables.execution_of(row) for row in transaction.connection.execute(_DUE, {"until": now, "most": most})
    ]
    waiting = [execution.execution_id for execution in due if execution.wants_locks]
    granted = {name for name, row in transaction.locks.of(waiting).items() if row.state == "granted"}
    changed = []
    for execution in due:
        events = _ends(execution, is_granted=execution.execution_id in granted)
        moved = _move(transaction, execution, events)
        if moved is None:
            # Nothing that this clock could end; it is not asked again.
            transaction.rearm(execution.execution_id, None)
            continue
        changed.append(moved)
        _note(transaction, execution, found)
    if changed:
        transaction.update(changed)
    found.again = len(due) == most
    return found


def _move(transaction: Transaction, execution: Execution, events: Sequence[Event]) -> Execution | None:
    moved = None
    for event in events:
        applied = transaction.move(moved or execution, None, event)
        if applied.transition is not None:
            moved = applied.transition.execution
    return moved


def _note(transaction: Transaction, before: Execution, found: Consequences) -> None:
    """What follows outside the ledger."""
    if before.status in UNSTARTED and before.is_backlog:
        found.left.append(before.action)
    if before.place is Place.TIMED_OUT_OPEN and not before.outside:
        found.stops.append(Stop(before, _ACTOR, "its time of grace after a time-out is over"))
    if before.place is Place.RUNNING:
        transaction.give_up(before)
        found.calls = True


def _ends(execution: Execution, *, is_granted: bool) -> Sequence[Event]:
    end = _ENDS.get(execution.place)
    return end(execution, is_granted) if end else ()


def _wait_ended(execution: Execution, is_granted: bool) -> Sequence[Event]:
    if execution.wants_locks and not is_granted:
        words = f"waited for its locks longer than {execution.lock_timeout_s or 0:g} s"
        failed = Failed(actor=_ACTOR, error_type="LockTimeout", error_message=words)
    else:
        words = f"waited for a slot longer than {execution.queue_timeout_s or 0:g} s"
        failed = Failed(actor=_ACTOR, error_type="QueueTimeout", error_message=words)
    # The law knows no failure of what has not begun: it begins, and fails, in one transaction.
    return [Started(actor=_ACTOR), failed]


def _run_ended(execution: Execution, is_granted: bool) -> Sequence[Event]:
    """Of work outside: what runs here has its limit from the worker, and no clock here."""
    message = f"ran longer than its limit of {execution.execution_timeout_s or 0:g} s"
    return [Failed(actor=_ACTOR, error_type="ExecutionTimeout", error_message=message)]


def _grace_ended(execution: Execution, is_granted: bool) -> Sequence[Event]:
    return [GraceEnded(reason=f"no update within {execution.timeout_grace_s:g} s after the time-out")]


_ENDS: dict[Place, Callable[[Execution, bool], Sequence[Event]]] = {
    Place.QUEUED: _wait_ended,
    Place.WAITING_FOR_LOCK: _wait_ended,
    Place.RUNNING: _run_ended,
    Place.TIMED_OUT_OPEN: _grace_ended,
}


# --- the wall clock --------------------------------------------------------------------------------------


def shift(transaction: Transaction, by_s: float) -> int:
    """The wall clock was set, or stood still with the machine: what was to come, comes as much later (or earlier).

    What was written since then has the new time already. A clock set back may leave something unshifted that was
    written just as long ago: it comes too late, which is better than too early.

    Returns:
        How many executions.
    """
    now = transaction.now
    is_older = _is_older(_EX.updated_at, now)
    # A request's `notBefore` is an instant, and stays; so does the end of the wait that begins then.
    is_of_now = or_(
        _EX.status.not_in(_UNSTARTED), _EX.attempt > 1, _EX.not_before.is_(None), _EX.not_before <= now
    )
    shifted = _move_clock(transaction, _EX.update_deadline, by_s, is_older)
    shifted += _move_clock(transaction, _EX.due_at, by_s, and_(is_older, is_of_now))
    workflows = schema.workflows.c
    _move_clock(transaction, workflows.due_at, by_s, _is_older(workflows.updated_at, now))
    if by_s < 0:
        _set_back(transaction, by_s, is_older)
    return shifted


def _set_back(transaction: Transaction, by_s: float, is_older: ColumnElement[bool]) -> None:
    """What comes early when the clock is set ahead, which does no harm, would stand still when it is set back."""
    now = transaction.now
    calls, asked = schema.calls.c, schema.job_locks.c
    _move_clock(transaction, calls.at, by_s, calls.at > now + AGAIN_S)
    _move_clock(
        transaction, asked.at, by_s, and_(asked.state.in_(["asked", "lost"]), asked.at > now + _JUST_NOW_S)
    )
    # The delay of another attempt.
    is_delayed = and_(_EX.status.in_(_UNSTARTED), _EX.attempt > 1, is_older)
    delayed = asked.execution_id.in_(select(_EX.execution_id).where(is_delayed))
    _move_clock(transaction, asked.at, by_s, and_(asked.state == "later", delayed))
    _move_clock(transaction, _EX.not_before, by_s, is_delayed)


def _is_older(written: ColumnElement[float], now: float) -> ColumnElement[bool]:
    """Whether something was written by the time as it was before."""
    return or_(written < now - _JUST_NOW_S, written > now + _JUST_NOW_S)


def _move_clock(transaction: Transaction, clock: Any, by_s: float, which: ColumnElement[bool]) -> int:
    moved = update(clock.table).where(clock.is_not(None), which).values({clock: clock + by_s})
    return transaction.connection.execute(moved).rowcount
