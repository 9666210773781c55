"""Commands inside a transaction: cancel, retry, resume, of one execution or of all of a workflow.

A cancel for what is not known is remembered, and applied when it arrives. Whoever asked hears what became of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from pydantic_core import to_json
from sqlalchemy import bindparam, delete, insert, select, tuple_

from jef_daemon.events import CancelRequested, Event, Retried, Stopped
from jef_daemon.ledger import rows, schema
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import UNSTARTED, WORKING, Execution, Place, Status
from jef_daemon.ports import Command, Consequences, Stop
from jef_daemon.tokens import new_token

_EX, _TS = schema.executions.c, schema.tombstones.c
_AT_ONCE = 500
"""Executions of a workflow in one transaction."""
_NAMES_AT_ONCE = 500
"""In one look for tombstones: a database takes so many parameters, and a batch of arrivals has no bound of its own."""
_OF_WORKFLOW = {
    "cancel": [Status.QUEUED, Status.WAITING_FOR_LOCK, Status.RUNNING, Status.TIMED_OUT],
    "retry": [Status.FAILED, Status.TIMED_OUT],
    "resume": [Status.TIMED_OUT],
}
"""Which of a workflow's executions a command means: a cancel lets failures stand as what they are."""

_PUT_TOMBSTONE = insert(schema.tombstones)
_DROP_TOMBSTONE = delete(schema.tombstones).where(_TS.kind == bindparam("k"), _TS.name == bindparam("n"))
_REMEMBERED = select(_TS.actor, _TS.reason).where(
    _TS.kind == bindparam("k"), _TS.name == bindparam("n"), _TS.until > bindparam("at")
)

Answer = tuple[bool, Status | None, str | None]
"""accepted, status, reason"""


def command(transaction: Transaction, commands: Sequence[Command], remember_s: float) -> Consequences:
    """Carry commands out, in order, and answer them.

    Args:
        transaction: to be committed by the caller.
        commands: each with `executionId` or `workflowId`.
        remember_s: how long a cancel waits for what it is about.
    """
    found = Consequences()
    for each in commands:
        control = each.control
        answer: Answer | None
        if control.workflow_id is not None:
            answer = _of_workflow(transaction, each, found, remember_s)
        else:
            name = control.execution_id or ""
            execution = transaction.known([name]).get(name)
            if execution is not None and not execution.handed_back:
                answer = _DO[control.command](transaction, execution, each, found)
            elif control.command == "cancel":
                answer = _remember(transaction, "execution", name, each, remember_s)
                found.unknown.add(name)
            else:
                answer = (False, None, f"no execution {name} is known")
        if answer is not None:
            found.answers.append(_reply(transaction, each, answer))
    return found


def apply_tombstones(transaction: Transaction, arrived: Sequence[Execution]) -> set[str]:
    """Cancel executions that somebody cancelled before they came; returns which."""
    names = [("execution", execution.execution_id) for execution in arrived]
    names += [("workflow", execution.workflow_id) for execution in arrived if execution.workflow_id]
    found = {
        (row.kind, row.name): row
        for start in range(0, len(names), _NAMES_AT_ONCE)
        for row in transaction.connection.execute(
            select(schema.tombstones).where(
                tuple_(_TS.kind, _TS.name).in_(names[start : start + _NAMES_AT_ONCE]),
                _TS.until > transaction.now,
            )
        )
    }
    cancelled = set()
    for execution in arrived:
        own = found.get(("execution", execution.execution_id))
        # A stage that cleans up, or is retried, comes behind the cancel of its workflow: its coordinator knows.
        of_workflow = None if execution.stage else found.get(("workflow", execution.workflow_id or ""))
        row = own or of_workflow
        if row is None:
            continue
        cancel = CancelRequested(actor=row.actor, reason=row.reason)
        if (move := transaction.move(execution, None, cancel).transition) is not None:
            transaction.update([move.execution])
            cancelled.add(execution.execution_id)
        if own is not None:
            transaction.connection.execute(_DROP_TOMBSTONE, {"k": "execution", "n": execution.execution_id})
    return cancelled


def remembered_cancel(transaction: Transaction, workflow_id: str) -> CancelRequested | None:
    """The cancel that somebody asked of a workflow before it came."""
    asked = {"k": "workflow", "n": workflow_id, "at": transaction.now}
    for actor, reason in transaction.driver.rows(_REMEMBERED, asked):
        return CancelRequested(actor=actor, reason=reason)
    return None


def has_tombstones(transaction: Transaction) -> bool:
    """Whether any cancel waits for something to arrive."""
    return transaction.connection.scalar(select(_TS.name).limit(1)) is not None


# --- one command each ------------------------------------------------------------------------------------


def _cancel(transaction: Transaction, execution: Execution, asked: Command, found: Consequences) -> Answer:
    force, reason = asked.control.force, asked.control.reason or "cancelled"
    if execution.place is Place.RUNNING and not (force or transaction.policy(execution.action).cancellable):
        return False, execution.status, f"{execution.action} cannot be cancelled while it runs; force does it"
    if execution.place in _OVER:
        return False, execution.status, f"it is {execution.status} already"
    before = execution
    events: list[Event] = []
    # Asked of what runs, it stands. What failed or fell silent after that is not cancelled yet.
    if not (execution.cancel_requested and execution.place is Place.RUNNING):
        events.append(CancelRequested(actor=asked.actor, reason=reason))
    if force and execution.place is Place.RUNNING:
        events.append(Stopped(actor=asked.actor, reason=reason, forced=True))
    for event in events:
        if (move := transaction.move(execution, None, event).transition) is not None:
            execution = move.execution
    transaction.update([execution])
    if before.place in WORKING:
        found.stops.append(Stop(before, asked.actor, reason))
        if before.outside and "cancel" in transaction.policy(before.action).hooks:
            transaction.give_up(before)
            found.calls = True
    if before.status in UNSTARTED and before.is_backlog:
        found.left.append(before.action)
    return True, execution.status, None


_OVER = frozenset({Place.COMPLETED, Place.CANCELLED})


def _retry(transaction: Transaction, execution: Execution, asked: Command, found: Consequences) -> Answer:
    reason = asked.control.reason or "retried"
    event = Retried(token=new_token(), actor=asked.actor, reason=reason)
    applied = transaction.move(execution, None, event)
    if applied.transition is None:
        return False, execution.status, f"it is {execution.status}: only FAILED and TIMED_OUT are retried"
    moved = applied.transition.execution
    transaction.update([moved])
    if moved.is_backlog:
        found.queued.append(moved.action)
    if execution.place is Place.TIMED_OUT_OPEN:
        found.stops.append(Stop(execution, asked.actor, reason))
        transaction.give_up(execution)
        found.calls |= execution.outside
    return True, moved.status, None


def _resume(transaction: Transaction, execution: Execution, asked: Command, found: Consequences) -> Answer:
    if execution.place is not Place.TIMED_OUT_OPEN:
        return False, execution.status, "only an open TIMED_OUT is resumed; a closed one can be retried"
    if "resume" not in transaction.policy(execution.action).hooks:
        return False, execution.status, f"the executor of {execution.action} has no resume"
    transaction.call(execution.execution_id, "resume", transaction.now)
    reason = asked.control.reason or "asked to resume"
    transaction.remember(rows.command_entry(execution, "ResumeAsked", asked.actor, reason, transaction.now))
    found.calls = True
    return True, execution.status, None


_DO: dict[str, Callable[[Transaction, Execution, Command, Consequences], Answer]] = {
    "cancel": _cancel,
    "retry": _retry,
    "resume": _resume,
}


def _of_workflow(
    transaction: Transaction, asked: Command, found: Consequences, remember_s: float
) -> Answer | None:
    """A page of a workflow, in the order of arrival; None: there are more pages."""
    control = asked.control
    name, what = control.workflow_id or "", control.command
    statuses = [status.value for status in _OF_WORKFLOW[what]]
    query = (
        select(*rows.COLUMNS, _EX.number)
        .where(_EX.workflow_id == name, _EX.status.in_(statuses), _EX.handed_back.is_(False))
        .where(_EX.number > asked.after)
        .order_by(_EX.number)
        .limit(_AT_ONCE)
    )
    if what == "cancel" and not control.force:
        query = query.where(_EX.cancel_requested.is_(False) | (_EX.status == Status.TIMED_OUT.value))
    if what != "resume":
        query = query.where(
            _EX.stage.is_(None)
        )  # a stage's job is its coordinator's, who hears the command too
    page = transaction.connection.execute(query).all()
    answers = [_DO[what](transaction, rows.execution_of(row), asked, found) for row in page]
    done = asked.done + sum(accepted for accepted, _, _ in answers)
    refused = asked.refused or next((reason or "" for accepted, _, reason in answers if not accepted), "")
    if len(page) == _AT_ONCE:
        found.more.append(dataclasses.replace(asked, after=page[-1].number, done=done, refused=refused))
        return None
    if _is_coordinated(transaction, name) and what != "resume":
        return None  # the coordinator answers
    if what == "cancel":
        _remember(transaction, "workflow", name, asked, remember_s)
        told = f"{done} cancelled; those that come later will be too"
        return True, None, f"{told}; not all: {refused}" if refused else told
    if done:
        return True, None, f"{done} of them" + (f"; not all: {refused}" if refused else "")
    return False, None, refused or f"no execution of {name} is concerned"


def _is_coordinated(transaction: Transaction, workflow_id: str) -> bool:
    known = select(schema.workflows.c.number).where(schema.workflows.c.workflow_id == workflow_id)
    return transaction.connection.scalar(known) is not None


def _remember(transaction: Transaction, kind: str, name: str, asked: Command, remember_s: float) -> Answer:
    transaction.connection.execute(delete(schema.tombstones).where(_TS.until <= transaction.now))
    transaction.connection.execute(_DROP_TOMBSTONE, {"k": kind, "n": name})
    transaction.connection.execute(
        _PUT_TOMBSTONE,
        {
            "kind": kind,
            "name": name,
            "until": transaction.now + remember_s,
            "actor": asked.actor,
            "reason": asked.control.reason or "cancelled",
        },
    )
    return True, None, f"not known yet: remembered for {remember_s / 3600:g} h, and applied when it arrives"


def _reply(transaction: Transaction, asked: Command, answer: Answer) -> dict[str, object]:
    accepted, status, reason = answer
    told: dict[str, object] = {"accepted": accepted, "status": status, "reason": reason}
    if asked.reply_to:
        transaction.post("", asked.reply_to, to_json(told), None, asked.correlation_id)
    return told
