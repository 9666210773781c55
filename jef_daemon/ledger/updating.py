"""Updates of async jobs inside a transaction: those that carry the attempt's token move it, others are refused.

An update that was persisted first wins over a time-out, and the other way round: both are events applied to what
the ledger says, one after the other.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence

from pydantic_core import to_json

from jef_daemon.commits import Counted
from jef_daemon.events import Completed, Event, Failed, Progressed, Stopped
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import FINAL, Execution
from jef_daemon.messages import Update
from jef_daemon.ports import Consequences, Reported


def update(
    transaction: Transaction, reported: Sequence[Reported], max_variables_bytes: int
) -> tuple[list[dict[str, object]], Consequences]:
    """Apply updates, in order, and answer them.

    Args:
        transaction: to be committed by the caller.
        reported: with the token that the executor was given.
        max_variables_bytes: longest JSON of both variable maps.

    Returns:
        What each sender is told, and what follows.
    """
    known = transaction.known({each.update.execution_id for each in reported})
    changed: dict[str, Execution] = {}
    told = []
    found = Consequences()
    for each in reported:
        execution = known.get(each.update.execution_id)
        answer, moved = _one(transaction, execution, each.update, max_variables_bytes, found)
        if moved is not None:
            known[moved.execution_id] = changed[moved.execution_id] = moved
        if each.reply_to:
            transaction.post("", each.reply_to, to_json(answer), None, each.correlation_id)
        told.append(answer)
    if changed:
        transaction.update(changed.values())
    return told, found


def _one(
    transaction: Transaction,
    execution: Execution | None,
    update: Update,
    limit: int,
    found: Consequences,
) -> tuple[dict[str, object], Execution | None]:
    if execution is None:
        transaction.count(Counted.UPDATE_REFUSED, "unknown-execution")
        return _refused(f"no execution {update.execution_id} is known"), None
    event = _EVENTS[update.status](update)
    if objection := _objection(execution, update, limit):
        code, reason = objection
        transaction.count(Counted.UPDATE_REFUSED, code)
        if code in _FENCED:
            transaction.count(Counted.FENCED, "update")
        transaction.refusals.note(execution, event, reason)
        return _refused(reason), None
    applied = transaction.move(execution, None, event)
    if applied.transition is None:
        code = "finished" if execution.status in FINAL else "not-running"
        transaction.count(Counted.UPDATE_REFUSED, code)
        return _refused(f"it is {execution.place.value} already"), None
    moved = applied.transition.execution
    if moved.attempt != execution.attempt and moved.is_backlog:
        found.queued.append(moved.action)
    return {"accepted": True, "cancelRequested": moved.cancel_requested}, moved


def _objection(execution: Execution, update: Update, limit: int) -> tuple[str, str] | None:
    """Why an update does not count, in a word and a sentence; None: it does."""
    if execution.fenced:
        return "fenced", "the attempt is fenced: its time of grace is over, or it was cancelled"
    if not hmac.compare_digest(execution.token.encode(), update.token.encode()):
        return "stale-token", "the token is not this attempt's"
    size = len(to_json([update.job_context_variables, update.workflow_context_variables]))
    if size > limit:
        return "too-long", f"the variables take {size} bytes; {limit} are allowed (jobs.max_variables_bytes)"
    return None


_FENCED = frozenset({"fenced", "stale-token"})
"""Objections by which an attempt that is over is kept out."""


def _refused(reason: str) -> dict[str, object]:
    return {"accepted": False, "reason": reason}


def _progressed(update: Update) -> Event:
    return Progressed(progress=update.progress, message=update.message, external_id=update.external_id)


def _completed(update: Update) -> Event:
    return Completed(
        result=update.result or update.message or "",
        external_id=update.external_id,
        job_context_variables=update.job_context_variables,
        workflow_context_variables=update.workflow_context_variables,
    )


def _failed(update: Update) -> Event:
    error = update.error
    if error is None:
        told = update.message or ""
        return Failed(error_type="ExternalFailure", error_message=told, external_id=update.external_id)
    return Failed(
        error_type=error.type,
        error_message=error.message,
        traceback=error.traceback,
        external_id=update.external_id,
    )


def _stopped(update: Update) -> Event:
    return Stopped(reason=update.message or "stopped outside")


_EVENTS: dict[str, Callable[[Update], Event]] = {
    "RUNNING": _progressed,
    "COMPLETED": _completed,
    "FAILED": _failed,
    "CANCELLED": _stopped,
}
