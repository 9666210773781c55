"""What the coordinator hands to the ledger, and what it hears: the port between the role and the transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jef_daemon.messages import Control
from jef_daemon.ports import Refusal
from jef_daemon.workflow.events import Ended, Event


@dataclass(frozen=True, slots=True)
class Begin:
    """A valid request for a workflow."""

    workflow_id: str
    name: str
    definitions: Mapping[str, str]
    """Its definition, and those of the workflows that its stages may start: canonical JSON by name."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class RefusedRequest:
    """A request that can never be a workflow: a dead letter, told where it can be named."""

    refusal: Refusal
    workflow_id: str | None
    name: str


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A stage's job has come to an end."""

    key: str
    """Of the workflow."""
    event: Ended


@dataclass(frozen=True, slots=True)
class LocksHeard:
    """The lock service has answered a workflow, or its clock has run out."""

    key: str
    """Of the workflow."""
    event: Event


@dataclass(frozen=True, slots=True)
class WorkflowCommand:
    """Somebody wants something of a workflow."""

    control: Control
    reply_to: str | None = None
    correlation_id: str | None = None


Input = Begin | RefusedRequest | JobEnded | LocksHeard | WorkflowCommand


class Became(StrEnum):
    """What became of an input."""

    NEW = "new"
    KNOWN = "known"
    """A request for a workflow that there is: nothing changed; a finished one is told again."""
    TAKEN = "taken"
    IGNORED = "ignored"
    """It concerns no workflow here, or none that waits for it."""
    REFUSED = "refused"
