"""What is told of workflows on `jef.workflow-status`, and what the coordinator reads of its stages' jobs. Pure."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import AwareDatetime, Field
from pydantic_core import from_json, to_json

from jef_daemon.lifecycle import FINAL, Status
from jef_daemon.messages import ErrorInfo, Variables, WaitingFor, Wire, timestamp
from jef_daemon.workflow import events
from jef_daemon.workflow.state import Phase, State, parsed

_KEY_BYTES = 255
_WORDS = {phase: phase.value for phase in Phase}
"""Encoding an enumeration's member costs as much as all else of a stage."""


class StageInfo(Wire):
    """A stage, as it is told."""

    name: str
    status: Phase = Field(description="WAITING, RUNNING, COMPLETED, FAILED, SKIPPED, CANCELLED, NOT_RUN.")


class WorkflowError(ErrorInfo):
    """Why a workflow FAILED."""

    stage: str | None = Field(default=None, description="Whose failure it is.")


class WorkflowNotification(Wire):
    """A notification on `jef.workflow-status`, routing key `<workflow>.<status in lower case>`."""

    workflow_id: str
    workflow: str = Field(description="The name of its definition.")
    progress: int = Field(ge=0, le=100, description="Stages that have ended, of all; NOT_RUN is none.")
    message: str
    status: Status = Field(description="QUEUED, WAITING_FOR_LOCK, RUNNING, COMPLETED, FAILED, CANCELLED.")
    revision: str | None = Field(description="Of its definition; null: it was refused.")
    sequence: int = Field(ge=0, description="Rises with each notification of a workflow; drop what you saw.")
    timestamp: AwareDatetime
    stages: list[StageInfo] | None = Field(default=None, description="In the order of the definition.")
    waiting_for: WaitingFor | None = Field(default=None, description="WAITING_FOR_LOCK only.")
    cancel_requested: bool | None = None
    variables: Variables | None = Field(default=None, description="COMPLETED only: the workflow's context.")
    error: WorkflowError | None = Field(default=None, description="FAILED only.")


def notification(state: State, name: str, revision: str, now: float) -> bytes:
    """What is told of a workflow as it stands."""
    told: dict[str, Any] = {
        "workflowId": state.workflow_id,
        "workflow": name,
        "progress": state.progress,
        "message": state.message,
        "status": state.status,
        "revision": revision,
        "sequence": state.sequence,
        "timestamp": timestamp(now),
        "stages": [{"name": each, "status": _WORDS[stage.phase]} for each, stage in state.stages.items()],
    }
    if state.waiting_for is not None:
        told["waitingFor"] = state.waiting_for
    if state.cancel_requested and state.status not in FINAL:
        told["cancelRequested"] = True
    if state.status is Status.COMPLETED:
        told["variables"] = state.context
    if state.status is Status.FAILED:
        told["error"] = {
            "type": "Failed",
            "message": "",
            **(state.error or {}),
            "stage": state.failed or None,
        }
    return to_json(told)


def refused_notification(workflow_id: str, name: str, said: str, now: float) -> bytes:
    """What is told of a workflow that never began, but whose id could be read."""
    return to_json(
        {
            "workflowId": workflow_id,
            "workflow": name,
            "progress": 0,
            "message": said,
            "status": Status.FAILED,
            "revision": None,
            "sequence": 0,
            "timestamp": timestamp(now),
            "error": {"type": "RequestRefused", "message": said, "stage": None},
        }
    )


@functools.lru_cache(maxsize=1024)
def routing_key(name: str, status: Status) -> str:
    """The routing key of a notification on `jef.workflow-status`; a name too long for it (nobody's) is cut."""
    word = f".{status.value.lower()}"
    room = _KEY_BYTES - len(word)
    return (name if len(name.encode()) <= room else name.encode()[:room].decode(errors="ignore")) + word


def ended(body: bytes | str) -> tuple[str, events.Ended] | None:
    """Key of the workflow and what has ended, from a status notification; None: it concerns no workflow.

    A failure that the action's own policy lets another attempt follow is no end.
    """
    try:
        told = from_json(body)
        found = parsed(told["executionId"])
        status = Status(told["status"])
        if found is None or status not in FINAL or told.get("retried"):
            return None
        key, stage, index, attempt = found
        sequence = told.get("sequence")
        error = told.get("error")
        return key, events.Ended(
            stage=stage,
            index=index,
            attempt=attempt,
            status=status,
            actor=str(told.get("by") or "executor"),
            reason=str(told.get("reason") or ""),
            sequence=sequence if isinstance(sequence, int) else None,
            result=str(told.get("result") or ""),
            job_variables=_map(told.get("jobContextVariables")),
            workflow_variables=_map(told.get("workflowContextVariables")),
            error=_error(error) if isinstance(error, dict) else None,
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # no notification of ours, and of nobody who says what a job has come to


def _map(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _error(found: dict[str, Any]) -> dict[str, str]:
    return {"type": str(found.get("type") or "Failed"), "message": str(found.get("message") or "")}
