"""What is told of a job: a transition → its status notification, the routing key it goes under. Pure.

Part in the flow: the ledger encodes here what it puts into the outbox with each transition; `notify` sends it. Key by
key, as each transition passes here: what `jef schema` publishes is `messages.StatusNotification`, and a test holds
both together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from jef_daemon.errors import RequestRefused
from jef_daemon.events import CancelRequested, Completed, Event, Failed, LockAwaited, Stopped
from jef_daemon.lifecycle import Execution, Status, Transition
from jef_daemon.messages import timestamp

_KEY_BYTES = 255
"""Longest routing key of AMQP."""


def notification(transition: Transition, *, tracebacks: bool = True, is_retried: bool = False) -> bytes:
    """The status notification of a transition, the seed's five keys first.

    Args:
        transition: what was applied.
        tracebacks: whether a FAILED one tells its stack trace.
        is_retried: whether another attempt follows at once.
    """
    execution, event = transition.execution, transition.event
    told = _heading(execution, transition.at)
    if execution.external_id:
        told["externalId"] = execution.external_id
    addition = _ADDITIONS.get(type(event))
    if addition:
        told |= addition(event, tracebacks)
    if is_retried:
        told["retried"] = True
    if execution.cancel_requested and execution.status is Status.RUNNING:
        told["cancelRequested"] = True
    if transition.late:
        told["late"] = True
    if execution.update_deadline is not None:
        told["updateDeadline"] = timestamp(execution.update_deadline)
    return to_json(told)


def refused_notification(action: str, error: RequestRefused, now: float) -> bytes:
    """The FAILED notification of a message that never became an execution, but whose id could be read."""
    execution = Execution(error.execution_id or "", action, status=Status.FAILED, message=error.detail)
    told = _heading(execution, now)
    return to_json(told | {"error": {"type": "RequestRefused", "message": f"{error.code}: {error.detail}"}})


def routing_key(action: str, status: Status) -> str:
    """The routing key of a notification on `jef.status`; an action too long for it (nobody's, then) is cut."""
    word = f".{status.value.lower()}"
    room = _KEY_BYTES - len(word)
    if len(action) * 4 > room:
        action = action.encode()[:room].decode(errors="ignore")
    return action + word


def _heading(execution: Execution, at: float) -> dict[str, Any]:
    return {
        "executionId": execution.execution_id,
        "workflowId": execution.workflow_id,
        "progress": execution.progress,
        "message": execution.message,
        "status": execution.status,
        "action": execution.action,
        "attempt": execution.attempt,
        "sequence": execution.sequence,
        "timestamp": timestamp(at),
    }


def _of_completed(event: Completed, tracebacks: bool) -> dict[str, Any]:
    return {
        "result": event.result,
        "jobContextVariables": event.job_context_variables,
        "workflowContextVariables": event.workflow_context_variables,
    }


def _of_failed(event: Failed, tracebacks: bool) -> dict[str, Any]:
    error = {"type": event.error_type, "message": event.error_message}
    if tracebacks and event.traceback:
        error["traceback"] = event.traceback
    return {"error": error}


def _of_cancel(event: CancelRequested | Stopped, tracebacks: bool) -> dict[str, Any]:
    return {"by": event.actor, "reason": event.reason}


def _of_waiting(event: LockAwaited, tracebacks: bool) -> dict[str, Any]:
    return {"waitingFor": dict(event.waiting_for)}


_ADDITIONS: Mapping[type[Event], Any] = {
    Completed: _of_completed,
    Failed: _of_failed,
    LockAwaited: _of_waiting,
    CancelRequested: _of_cancel,
    Stopped: _of_cancel,
}
"""What a notification says beyond its heading, by the event that caused it."""
