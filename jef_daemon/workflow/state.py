"""Where a workflow stands: what the ledger keeps of it, as one JSON document. Pure."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter

from jef_daemon.lifecycle import Status
from jef_daemon.lock.state import Mode
from jef_daemon.messages import MOST_NESTED, is_nested_deeper

TOO_DEEP = f"they nest deeper than {MOST_NESTED} levels"
"""What is said of variables that nobody could read again, within all else of a workflow."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a workflow may carry."""

    variables_bytes: int = 256 * 1024
    """The workflow's context as JSON; a response's two maps have the same limit from their daemon."""
    request_bytes: int = 1024 * 1024
    """A request's body."""

    def objection(self, context: bytes) -> str:
        """Why a context, as JSON, is too much; empty: it is not."""
        if len(context) > self.variables_bytes:
            return f"the workflow's variables would have {len(context)} bytes; {self.variables_bytes} are allowed"
        return TOO_DEEP if is_nested_deeper(context, MOST_NESTED) else ""


class Phase(StrEnum):
    """How far a stage, or one job of it, has come."""

    WAITING = "WAITING"
    """Its needs have not passed, or a job of a `forEach` has no place yet."""
    RUNNING = "RUNNING"
    """Its request is on its way; the job may be queued, wait for locks, run, or be TIMED_OUT."""
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"
    """Its condition was false, or a `goto` went past it."""
    CANCELLED = "CANCELLED"
    NOT_RUN = "NOT_RUN"
    """The workflow failed or was cancelled before it began."""


OPEN = frozenset({Phase.WAITING, Phase.RUNNING})
"""Phases after which more is to come."""
ENDED = frozenset(Phase) - OPEN - {Phase.NOT_RUN}
"""Phases of those that count as done."""


@dataclass(slots=True)
class Run:
    """One job of a stage, or the other workflow that it is."""

    item: Any = None
    """Of a `forEach`."""
    phase: Phase = Phase.WAITING
    attempt: int = 0
    """Number of its last job. One that has had none yet begins above all that the stage had before."""
    tries: int = 0
    """Jobs since the stage began, or a person had it retried."""
    sequence: int = -1
    """Of the last notification of its job that counted."""
    timed_out: bool = False
    """Whether its job is TIMED_OUT."""
    then: str = ""
    """What follows when its job has been cancelled: `retry`, `fail` or `cancel`; empty: nobody asked."""
    result: str = ""
    variables: dict[str, Any] = field(default_factory=dict)
    """Its job context variables; for another workflow, its context at the end."""
    error: dict[str, Any] | None = None
    started_at: float | None = None
    finished_at: float | None = None


@dataclass(slots=True)
class StageState:
    """One stage."""

    phase: Phase = Phase.WAITING
    is_list: bool = False
    """Whether it has a job for each item of a list."""
    runs: list[Run] = field(default_factory=list)
    last_attempt: int = 0
    """Highest attempt of any of its jobs, ever: the next is above."""
    job: dict[str, Any] = field(default_factory=dict)
    """What it passes to the next stage."""
    error: dict[str, Any] | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    """What a person changed when retrying it."""


@dataclass(slots=True)
class Holding:
    """A lock that a workflow holds, or is to hold, across its stages."""

    resource: str
    """As its definition names it."""
    mode: Mode
    name: str
    """As the lock service knows it: another one where a workflow around this one holds the resource."""
    within: str
    """As stages and workflows within this one ask for it: it keeps them from one another, not from this one."""
    token: int | None = None
    """Fencing number; None: it is not held."""


@dataclass(slots=True)
class State:
    """One workflow. Times are UTC seconds since the epoch."""

    workflow_id: str
    key: str
    """Begins the execution ids of its jobs."""
    status: Status = Status.QUEUED
    priority: int = 0
    context: dict[str, Any] = field(default_factory=dict)
    """The workflow's variables."""
    origins: dict[str, str] = field(default_factory=dict)
    """Which stage set a variable last; `request` or `definition` for those that none has."""
    stages: dict[str, StageState] = field(default_factory=dict)
    failed: str = ""
    """The first stage whose failure is the workflow's."""
    error: dict[str, Any] | None = None
    """Why nothing begins any more but the `always` stages."""
    locks: list[Holding] = field(default_factory=list)
    """Its own, from when it first asked for them."""
    around: list[Holding] = field(default_factory=list)
    """Those of the workflows that it is within, the nearest first."""
    waiting_for: dict[str, Any] | None = None
    """What it waits for: resource, mode, position, holders."""
    due_at: float | None = None
    """When its wait for locks is over."""
    cancel_requested: bool = False
    cancelled_by: str = ""
    message: str = ""
    progress: int = 0
    sequence: int = 0
    """Number of its last notification."""
    parent: str | None = None
    """The execution id that it has as a stage of another workflow."""
    children: dict[str, str] = field(default_factory=dict)
    """Revision of each workflow that stages, near and far, may start: pinned with this one."""
    depth: int = 0
    """How many workflows it is within."""
    traceparent: str | None = None
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None


_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_KEY_CHARACTERS = 64
_OWNER = "workflow/"
MOST_CHARACTERS = 255
"""Of a resource's or an owner's name."""


def key_of(workflow_id: str) -> str:
    """What the execution ids of a workflow's jobs begin with: its own id where that is fit for it."""
    # No colon: what stands behind the last two is stage and attempt, and an id could be read in two ways.
    if len(workflow_id) <= _KEY_CHARACTERS and not _UNSAFE.search(workflow_id):
        return workflow_id
    return "wf-" + hashlib.sha256(workflow_id.encode()).hexdigest()[:40]


def lock_owner(workflow_id: str) -> str:
    """The owner of the locks that a workflow holds: no job's execution id has a slash."""
    name = f"{_OWNER}{workflow_id}"
    return name if len(name) <= MOST_CHARACTERS else _OWNER + key_of(workflow_id)


def key_of_owner(owner: str) -> str | None:
    """The key of the workflow that holds locks under a name; None: it is a job's."""
    return key_of(owner.removeprefix(_OWNER)) if owner.startswith(_OWNER) else None


def within(owner: str, resource: str) -> str:
    """What stages and workflows within a workflow ask for instead of a resource that it holds."""
    name = f"{owner}/{resource}"
    if len(name) <= MOST_CHARACTERS:
        return name
    return f"{_OWNER}{hashlib.sha256(name.encode()).hexdigest()[:40]}"


def execution_id(key: str, stage: str, index: int | None, attempt: int) -> str:
    """The id of a stage's job: always the same for the same attempt, so that it never runs twice."""
    which = stage if index is None else f"{stage}.{index}"
    return f"{key}:{which}:{attempt}"


def parsed(name: str) -> tuple[str, str, int | None, int] | None:
    """Key, stage, index and attempt of an execution id; None: no stage has such."""
    key, _, rest = name.partition(":")
    which, _, attempt = rest.partition(":")
    stage, dot, index = which.partition(".")
    if not (key and stage and attempt.isdecimal() and attempt.isascii()):
        return None
    if dot and not (index.isdecimal() and index.isascii()):
        return None
    return key, stage, int(index) if dot else None, int(attempt)


def encode(state: State) -> str:
    """As the ledger keeps it: what is as it was at first is left out."""
    return _as_json().dump_json(state, exclude_defaults=True).decode()


def decode(text: str) -> State:
    """As the law takes it; what is not known any more is left out."""
    return _as_json().validate_json(text)


@functools.cache
def _as_json() -> TypeAdapter[State]:
    # Made when it is wanted first: a daemon without workflows, and the command line, need not wait for it.
    return TypeAdapter(State)
